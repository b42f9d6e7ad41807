import { HashState } from '../browser/shell'
import { placeOf } from '../model/gradient'
import { button, choice, element, searchBox, THEMES } from '../presentation/elements'
import { type Direction, nearestInDirection } from '../presentation/svg'

/** The state in a link to a gradient's page; '' means the page's default. */
export const GRADIENT_STATE = {
  /** Matrix with its inputs shown. */
  imprint: '',
  /** Matrix with its VJPs shown. */
  shift: '',
  /** Matrix with the ranks of the target shown. */
  rank: '',
  /** Index of the target, if the loss has several. */
  target: '',
  /** What the colour of a cell shows: |δ| (''), |x||δ| (`size`) or the target's rank (`rank`). */
  colour: '',
  /** Tokens to show: both (''), promoted or suppressed. */
  ends: '',
  /** Expert to show; '' = the one with the largest component at each place. */
  expert: '',
  /** Text or token id to search for. */
  q: '',
  /** The selected component, e.g. `L3/p7/FF2`. */
  sel: '',
  theme: '',
} as const

export type GradientKey = keyof typeof GRADIENT_STATE
export type GradientState = HashState<GradientKey>

export function gradientState(): GradientState {
  return new HashState<GradientKey>(GRADIENT_STATE)
}

/** Actions of the toolbar and keyboard that do not change the state. */
export interface Commands {
  export: () => void
  help: () => void
  search: () => void
}

const ENDS = [
  ['', '↑ promoted and ↓ suppressed'],
  ['promoted', '↑ promoted only'],
  ['suppressed', '↓ suppressed only'],
] as const

const COLOURS = [
  ['', 'colour: |δ|'],
  ['size', 'colour: |x||δ|'],
  ['rank', 'colour: promotion rank'],
] as const

/** Fills the toolbar and returns a function that updates its controls from the state. */
export function toolbar(
  bar: HTMLElement,
  state: GradientState,
  commands: Commands,
): (experts: readonly number[]) => void {
  const search = searchBox((q) => state.set({ q }))
  const ends = choice('Tokens', ENDS, (value) => state.set({ ends: value }))
  const colours = choice('Colour of the cells', COLOURS, (value) => state.set({ colour: value }))
  const experts = choice('Expert', [], (value) => state.set({ expert: value }))
  const theme = choice('Theme', THEMES, (value) => state.set({ theme: value }))
  const exports = button('Export', 'Export figures or the recorded stream', commands.export)
  bar.append(search, ends, colours, experts, theme, exports, button('?', 'Keys', commands.help))
  return (known) => {
    if (document.activeElement !== search) search.value = state.get('q')
    setExperts(experts, known)
    ends.value = state.get('ends')
    colours.value = state.get('colour')
    experts.value = state.get('expert')
    theme.value = state.get('theme')
  }
}

function setExperts(select: HTMLSelectElement, experts: readonly number[]): void {
  select.hidden = experts.length === 0
  if (select.options.length === experts.length + 1) return
  const options = experts.map((expert) =>
    element('option', { value: String(expert) }, `e${expert}`),
  )
  select.replaceChildren(element('option', { value: '' }, 'largest expert'), ...options)
}

export const KEYS = [
  ['← → ↑ ↓', 'move to the nearest cell'],
  ['Enter', 'select the focused cell'],
  ['Esc', 'clear selection and search'],
  ['e', 'show promoted and suppressed tokens, or only one of them'],
  ['/', 'search for a token'],
  ['?', 'show this help'],
] as const

const END_CYCLE = ['', 'promoted', 'suppressed']

/** Handles keyboard shortcuts, except while the user types. */
export function listenToKeys(state: GradientState, commands: Commands): void {
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !acts(event, state, commands)) return
    event.preventDefault()
  })
}

function acts(event: KeyboardEvent, state: GradientState, commands: Commands): boolean {
  const { target, key } = event
  if (target instanceof HTMLInputElement || target instanceof HTMLSelectElement) return false
  if (document.querySelector('dialog[open]')) return false
  if (target instanceof SVGElement && key.startsWith('Arrow')) {
    const picture = target.closest('svg')
    if (picture) nearestInDirection(picture, target, key as Direction)?.focus()
    return true
  }
  if (target instanceof SVGElement && (key === 'Enter' || key === ' ')) {
    const id = target.dataset.id ?? ''
    if (placeOf(id)) state.set({ sel: id })
    return true
  }
  if (key === 'Escape') state.set({ sel: '', q: '' })
  else if (key === 'e')
    state.set({ ends: END_CYCLE[(END_CYCLE.indexOf(state.get('ends')) + 1) % 3] ?? '' })
  else if (key === '/') commands.search()
  else if (key === '?') commands.help()
  else return false
  return true
}
