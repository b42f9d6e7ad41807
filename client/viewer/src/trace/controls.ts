import { HashState } from '../browser/shell'
import type { FlowGraph } from '../model/flow_graph'
import { strongestDestination, strongestSource } from '../model/graph_queries'
import {
  button,
  choice,
  element,
  exporter,
  searchBox,
  setPressed,
  THEMES,
  toggle,
} from '../presentation/elements'
import { type Direction, nearestInDirection } from '../presentation/svg'
import type { Row } from './layer_model'

/** What a link to a trace's page can say; every value is a string, '' = the page's own choice. */
export const TRACE_STATE = {
  /** Position whose story is told. */
  pos: '',
  /** What stands above: the residual stream (''), or `heads`. */
  map: '',
  /** Layers shown in detail: `3` or `2,3`. */
  layers: '',
  /** Id of the selected node. */
  sel: '',
  /** Ids of pinned nodes. */
  pin: '',
  /** Text or token id searched for. */
  q: '',
  /** Kinds hidden: attention, mlp, bias, rest. */
  hide: '',
  /** Heads whose rows of W_O are listed, as `layer.head`: `3.2,3.0`. */
  heads: '',
  /** Smallest |share| shown, in percent. */
  min: '',
  /** Only parts that add (+) or subtract (-). */
  sign: '',
  /** 1 = the strongest path to the target is followed. */
  path: '',
  /** Which view stands below the overview: the picture (''), or `table`. */
  view: '',
  theme: '',
} as const

export type TraceKey = keyof typeof TRACE_STATE
export type TraceState = HashState<TraceKey>

export function traceState(): TraceState {
  return new HashState<TraceKey>(TRACE_STATE)
}

// Which parts are shown: filters hide rows, and say how much of the sum they hide.

export interface Filter {
  /** Equal for equal filters. */
  key: string
  /** Smallest |share| shown, as a fraction. */
  minimum: number
  sign: '' | '+' | '-'
  /** Kinds of rows that are hidden. */
  hidden: ReadonlySet<string>
  /** Heads whose rows of W_O are listed, as `layer.head`. */
  opened: ReadonlySet<string>
}

export function filterOf(state: TraceState): Filter {
  const sign = state.get('sign')
  return {
    key: (['hide', 'min', 'sign', 'heads'] as const).map((key) => state.get(key)).join(' '),
    minimum: (Number(state.get('min')) || 0) / 100,
    sign: sign === '+' || sign === '-' ? sign : '',
    hidden: new Set(state.list('hide')),
    opened: new Set(state.list('heads')),
  }
}

export interface Filtered<Item extends Row> {
  shown: Item[]
  hidden: number
  /** Share of the sum's absolute mass that the rows shown make up. */
  kept: number
}

/** The rows that pass; `kept` is of the rows given, the remainder of the sum not among them. */
export function passing<Item extends Row>(rows: readonly Item[], filter: Filter): Filtered<Item> {
  const shown = rows.filter((row) => passes(row.share ?? 0, filter))
  const all = mass(rows)
  return { shown, hidden: rows.length - shown.length, kept: all > 0 ? mass(shown) / all : 1 }
}

function passes(share: number, filter: Filter): boolean {
  if (Math.abs(share) < filter.minimum) return false
  return filter.sign === '' || (filter.sign === '+' ? share > 0 : share < 0)
}

function mass(rows: readonly Row[]): number {
  return rows.reduce((sum, row) => sum + Math.abs(row.share ?? 0), 0)
}

/** What the toolbar can ask of the page beside changing its state. */
export interface Commands {
  exportAs: (format: string) => void
  help: () => void
}

const MAPS = [
  ['', 'stream', 'Above: the residual stream, token by token'],
  ['heads', 'heads', 'Above: all heads of the position, layer by layer'],
] as const

const KINDS = [
  ['attention', 'attention'],
  ['mlp', 'MLP'],
  ['rest', 'rest'],
  ['bias', 'bias'],
] as const

/** Fills the toolbar; gives back what brings its controls in line with the state. */
export function toolbar(bar: HTMLElement, state: TraceState, commands: Commands): () => void {
  const search = searchBox((q) => state.set({ q }))
  const path = toggle('Follow the path', 'The strongest way back from the target', () =>
    flip(state, 'path'),
  )
  const maps = MAPS.map(([map, text, title]) => ({
    map,
    control: toggle(text, title, () => state.set({ map })),
  }))
  const kinds = KINDS.map(([kind, text]) => ({
    kind,
    control: toggle(text, `Show or hide: ${text}`, () => flipIn(state, 'hide', kind)),
  }))
  const selects = [
    select(state, 'min', 'Smallest share', [
      ['', 'any share'],
      ['1', '≥ 1 %'],
      ['2', '≥ 2 %'],
      ['5', '≥ 5 %'],
      ['10', '≥ 10 %'],
    ]),
    select(state, 'sign', 'Sign', [
      ['', '+ and −'],
      ['+', '+ only'],
      ['-', '− only'],
    ]),
    select(state, 'view', 'View', [
      ['', 'picture'],
      ['table', 'table'],
    ]),
    select(state, 'theme', 'Theme', THEMES),
  ]
  bar.append(
    search,
    element('span', { class: 'group' }, ...maps.map(({ control }) => control)),
    path,
    element('span', { class: 'group' }, ...kinds.map(({ control }) => control)),
    ...selects.map(({ control }) => control),
    exporter(commands.exportAs),
    button('?', 'Keys', commands.help),
  )
  return () => {
    if (document.activeElement !== search) search.value = state.get('q')
    for (const { map, control } of maps) setPressed(control, state.get('map') === map)
    setPressed(path, state.get('path') !== '')
    for (const { kind, control } of kinds) setPressed(control, !state.list('hide').includes(kind))
    for (const { key, control } of selects) control.value = state.get(key)
  }
}

function select(
  state: TraceState,
  key: TraceKey,
  name: string,
  options: readonly (readonly [string, string])[],
) {
  return { key, control: choice(name, options, (value) => state.set({ [key]: value })) }
}

export function flip(state: TraceState, key: TraceKey): void {
  state.set({ [key]: state.get(key) === '' ? '1' : '' })
}

/** Puts an entry into a list of the state, or takes it out. */
export function flipIn(state: TraceState, key: TraceKey, entry: string): void {
  const list = state.list(key)
  const next = list.includes(entry) ? list.filter((other) => other !== entry) : [...list, entry]
  state.set({ [key]: next.join(',') })
}

export const KEYS = [
  ['← → ↑ ↓', 'to the neighbour'],
  ['Enter', 'select it, or open it'],
  ['Esc', 'let go'],
  ['[', 'to the strongest source of the selected'],
  [']', 'to what it goes into'],
  ['p', 'pin the selected, or unpin it'],
  ['f', 'follow the path to the target'],
  ['/', 'search'],
  ['h', 'heads or residual stream'],
  ['t', 'table or picture'],
  ['?', 'these keys'],
] as const

interface KeyCommands {
  select: (id: string) => void
  pin: (id: string) => void
  openHead: (head: string) => void
  help: () => void
  search: () => void
}

/** What the keyboard does, wherever nobody is typing. */
export function listenToKeys(graph: FlowGraph, state: TraceState, commands: KeyCommands): void {
  const selected = () => state.get('sel')
  const to = (id: string | undefined) => id && commands.select(id)
  const actions: Record<string, () => void> = {
    Escape: () => state.set({ sel: '', q: '', path: '' }),
    '[': () => to(strongestSource(graph, selected())?.id),
    ']': () => to(strongestDestination(graph, selected())?.id),
    p: () => selected() && commands.pin(selected()),
    f: () => flip(state, 'path'),
    h: () => state.set({ map: state.get('map') === 'heads' ? '' : 'heads' }),
    t: () => state.set({ view: state.get('view') === 'table' ? '' : 'table' }),
    '/': commands.search,
    '?': commands.help,
  }
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return
    if (moved(event) || entered(event, commands)) return event.preventDefault()
    const action = actions[event.key]
    if (!action || document.querySelector('dialog[open]')) return
    event.preventDefault()
    action()
  })
}

function typing(target: EventTarget | null): boolean {
  return target instanceof HTMLInputElement || target instanceof HTMLSelectElement
}

function moved(event: KeyboardEvent): boolean {
  const from = event.target
  if (!event.key.startsWith('Arrow') || !(from instanceof SVGElement)) return false
  const picture = from.closest('svg')
  const next = picture && nearestInDirection(picture, from, event.key as Direction)
  next?.focus()
  return true
}

function entered(event: KeyboardEvent, commands: KeyCommands): boolean {
  if (event.key !== 'Enter' || !(event.target instanceof SVGElement)) return false
  const { id, head } = event.target.dataset
  if (id) commands.select(id)
  if (head) commands.openHead(head)
  return id !== undefined || head !== undefined
}
