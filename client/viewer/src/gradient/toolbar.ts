import { button, choice, exporter, searchBox, THEMES } from '../parts/controls'
import { element } from '../parts/dom'
import type { GradientState } from './state'

/** What the toolbar and the keys can ask of the page beside changing its state. */
export interface Commands {
  exportAs: (format: string) => void
  help: () => void
  search: () => void
}

const ENDS = [
  ['', '▲ top and ▼ bottom'],
  ['top', '▲ top only'],
  ['bottom', '▼ bottom only'],
] as const

/** Fills the toolbar; gives back what brings its controls in line with the state. */
export function toolbar(
  bar: HTMLElement,
  state: GradientState,
  commands: Commands,
): (experts: readonly number[]) => void {
  const search = searchBox((q) => state.set({ q }))
  const ends = choice('Ends', ENDS, (value) => state.set({ ends: value }))
  const experts = choice('Expert', [], (value) => state.set({ expert: value }))
  const theme = choice('Theme', THEMES, (value) => state.set({ theme: value }))
  const exports = exporter(commands.exportAs)
  bar.append(search, ends, experts, theme, exports, button('?', 'Keys', commands.help))
  return (known) => {
    if (document.activeElement !== search) search.value = state.get('q')
    offerExperts(experts, known)
    ends.value = state.get('ends')
    experts.value = state.get('expert')
    theme.value = state.get('theme')
  }
}

function offerExperts(select: HTMLSelectElement, experts: readonly number[]): void {
  select.hidden = experts.length === 0
  if (select.options.length === experts.length + 1) return
  const options = experts.map((expert) =>
    element('option', { value: String(expert) }, `e${expert}`),
  )
  select.replaceChildren(element('option', { value: '' }, 'largest expert'), ...options)
}
