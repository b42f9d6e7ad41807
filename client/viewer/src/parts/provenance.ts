import type { ProvenanceMessage } from '../contract/messages'
import { element } from './dom'

/** Which weights said it, and whether the stream came whole. */
export function provenanceLine(provenance: ProvenanceMessage, complete: boolean): HTMLElement {
  const { model, architecture, dataType, device, revision, versions } = provenance
  const words = [
    `model ${model ?? ''}`,
    architecture,
    dataType,
    device,
    `revision ${(revision ?? '').slice(0, 12)}`,
    `januslens ${versions?.januslens ?? ''}`,
  ]
  const line = element('p', { class: 'provenance' }, words.filter(Boolean).join(' · '))
  if (!complete) line.append(element('strong', { class: 'incomplete' }, ' · not complete'))
  return line
}
