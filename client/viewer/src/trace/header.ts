import type { FlowGraph } from '../graph/graph'
import { element, tokenText } from '../parts/dom'
import { story } from './story'

/** The prompt, what came of it, and which weights said so. */
export function fillHeader(heading: HTMLElement, graph: FlowGraph, position: number): void {
  const tokens = graph.prompt.map((token, i) => {
    const shown = tokenText(token.label.replace(/^␣/, ' '))
    if (i === position) shown.classList.add('selected')
    return shown
  })
  const target = graph.targets.get(position)?.target
  const title = element('h1', {}, ...tokens)
  if (target) title.append(element('span', { class: 'arrow' }, ' → '), tokenText(target.label))
  title.lastElementChild?.classList.add('answer')
  heading.replaceChildren(title, story(graph, position), provenance(graph))
}

function provenance(graph: FlowGraph): HTMLElement {
  const { model, architecture, dataType, device, revision, versions } = graph.provenance
  const words = [
    `model ${model ?? ''}`,
    architecture,
    dataType,
    device,
    `revision ${(revision ?? '').slice(0, 12)}`,
    `januslens ${versions?.januslens ?? ''}`,
  ]
  const line = element('p', { class: 'provenance' }, words.filter(Boolean).join(' · '))
  if (!graph.complete) line.append(element('strong', {}, ' · cut short'))
  return line
}
