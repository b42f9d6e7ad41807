// The controls by which an edit is previewed beside a gradient.
import { button, choice } from '../parts/controls'
import { element } from '../parts/dom'
import { ask, CallError } from './calls'
import type { Panel } from './panel'
import { type EditAsked, editTitle, previewRequest } from './requests'

/** Adds to a gradient's panel what previews an edit; `layers` is how many the model has. */
export function addEdits(panel: Panel, layers: number, watched: () => string[]): void {
  const strength = element('input', {
    class: 'search strength',
    'aria-label': 'Strength of the edit',
    value: '0.15',
    inputmode: 'decimal',
  })
  const names = Array.from({ length: layers }, (_, i) => [String(i), `layer ${i}`] as const)
  const layer = choice('Layer of the edit', names, () => {})
  layer.value = String(layers - 1)
  const kind = choice('Edit', EDITS, (value) => {
    strength.value = value === 'shift' ? '0.15' : '0.001'
    layer.hidden = value !== 'shift'
  })
  const said = element('span', { class: 'status', role: 'status' })
  const preview = button('Preview edit', 'What it would do to the answer', () => {
    const edit: EditAsked = {
      kind: kind.value as EditAsked['kind'],
      strength: Number(strength.value),
      layer: Number(layer.value),
    }
    said.textContent = ''
    show(panel, edit, watched()).catch((error: unknown) => {
      if (!(error instanceof CallError)) throw error
      said.textContent = error.message
    })
  })
  panel.bar.append(kind, layer, strength, preview, said)
}

const EDITS = [
  ['shift', 'forward-pass shift by η'],
  ['descent', 'descent step of rate'],
] as const

async function show(panel: Panel, edit: EditAsked, probes: readonly string[]): Promise<void> {
  const response = await ask('PreviewEdit', previewRequest(panel.asked, edit, probes))
  const title = editTitle(edit)
  panel.streams[`preview:${title}`] = [JSON.stringify(response)]
  panel.frame.post({ stream: 'previews', message: { title, response } })
}
