import { HashState } from '../browser/shell'
import { pageDescription } from '../browser/streams'
import { finite } from '../contract'
import type { FlowGraph } from '../model/flow_graph'
import { strongestDestination, strongestSource } from '../model/graph_queries'
import {
  button,
  choice,
  element,
  searchBox,
  setPressed,
  THEMES,
  toggle,
} from '../presentation/elements'
import { type Direction, nearestInDirection } from '../presentation/svg'
import type { Row } from './layer_model'

/** The state in a link to a trace's page; '' means the page's default. */
export const TRACE_STATE = {
  /** The position that is explained. */
  pos: '',
  /** The overview: the residual stream ('') or `heads`. */
  map: '',
  /** Layers shown in detail: `3` or `2,3`. */
  layers: '',
  /** Id of the selected node. */
  sel: '',
  /** Ids of pinned nodes. */
  pin: '',
  /** Text or token id to search for. */
  q: '',
  /** Hidden kinds: attention, mlp, bias, rest. */
  hide: '',
  /** Heads with their W_O rows expanded, as `layer.head`: `3.2,3.0`. */
  heads: '',
  /** Smallest |share| shown, in percent. */
  min: '',
  /** Width of the overview's arcs: what they add to the logit (''), or `share`. */
  arcs: '',
  /** Only parts that add (+) or subtract (-). */
  sign: '',
  /** 1 = the contribution tree of the target is shown. */
  path: '',
  /** The view below the overview: the picture ('') or `table`. */
  view: '',
  /** Names and notes of heads and neurons; see `annotationsOf`. */
  names: '',
  theme: '',
} as const

export type TraceKey = keyof typeof TRACE_STATE
export type TraceState = HashState<TraceKey>

export function traceState(): TraceState {
  return new HashState<TraceKey>({ ...TRACE_STATE, names: pageDescription().names ?? '' })
}

// Filters hide rows and report how much of the sum they hide.

export interface Filter {
  /** Changes whenever the shown rows change. */
  key: string
  /** Smallest |share| shown, as a fraction. */
  minimum: number
  sign: '' | '+' | '-'
  /** Hidden kinds of rows. */
  hidden: ReadonlySet<string>
  /** Heads with their W_O rows expanded, as `layer.head`. */
  opened: ReadonlySet<string>
  /** What the width of the overview's arcs shows. */
  arcs: 'effect' | 'share'
}

export function filterOf(state: TraceState): Filter {
  const sign = state.get('sign')
  return {
    key: (['hide', 'min', 'sign', 'heads'] as const).map((key) => state.get(key)).join(' '),
    minimum: (Number(state.get('min')) || 0) / 100,
    sign: sign === '+' || sign === '-' ? sign : '',
    hidden: new Set(state.list('hide')),
    opened: new Set(state.list('heads')),
    arcs: state.get('arcs') === 'share' ? 'share' : 'effect',
  }
}

export interface Filtered<Item extends Row> {
  shown: Item[]
  hidden: number
  /** The shown rows' part of the total |share| of all rows. */
  kept: number
}

/** Applies a filter to rows, which do not include the remainder of their sum. */
export function passing<Item extends Row>(rows: readonly Item[], filter: Filter): Filtered<Item> {
  const shown = rows.filter((row) => passes(finite(row.share), filter))
  const all = mass(rows)
  return { shown, hidden: rows.length - shown.length, kept: all > 0 ? mass(shown) / all : 1 }
}

/** Whether a filter shows a row with this share. */
export function passes(share: number, filter: Filter): boolean {
  if (Math.abs(share) < filter.minimum) return false
  return filter.sign === '' || (filter.sign === '+' ? share > 0 : share < 0)
}

function mass(rows: readonly Row[]): number {
  return rows.reduce((sum, row) => sum + Math.abs(finite(row.share)), 0)
}

/** Actions of the toolbar that do not change the state. */
export interface Commands {
  export: () => void
  help: () => void
}

const MAPS = [
  ['', 'stream', 'Overview of the residual stream by token'],
  ['heads', 'heads', 'Overview of all heads at this position by layer'],
] as const

const KINDS = [
  ['attention', 'attention'],
  ['mlp', 'MLP'],
  ['rest', 'rest'],
  ['bias', 'bias'],
] as const

/** Fills the toolbar and returns a function that updates its controls from the state. */
export function toolbar(bar: HTMLElement, state: TraceState, commands: Commands): () => void {
  const search = searchBox((q) => state.set({ q }))
  const path = toggle(
    'Show why',
    'List and highlight the parts that contribute most to the target’s logit',
    () => flip(state, 'path'),
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
    select(state, 'arcs', 'Width of the arcs', [
      ['', 'arcs by effect'],
      ['share', 'arcs by share'],
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
    button('Export', 'Export figures or the recorded stream', commands.export),
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

/** Adds an entry to a list of the state, or removes it. */
export function flipIn(state: TraceState, key: TraceKey, entry: string): void {
  const list = state.list(key)
  const next = list.includes(entry) ? list.filter((other) => other !== entry) : [...list, entry]
  state.set({ [key]: next.join(',') })
}

export const KEYS = [
  ['← → ↑ ↓', 'move to the nearest element'],
  ['Enter', 'select or expand the focused element'],
  ['Esc', 'clear selection, search and contributions'],
  ['[', 'select the strongest source'],
  [']', 'select the sum that it is part of'],
  ['p', 'pin or unpin the selected node'],
  ['n', 'name the selected head or neuron, or add a note to it'],
  ['f', 'show or hide where the logit comes from'],
  ['/', 'search for a token'],
  ['h', 'switch between heads and residual stream'],
  ['t', 'switch between table and picture'],
  ['?', 'show this help'],
] as const

interface KeyCommands {
  select: (id: string) => void
  pin: (id: string) => void
  annotate: (id: string) => void
  openHead: (head: string) => void
  help: () => void
  search: () => void
}

/** Handles keyboard shortcuts, except while the user types. */
export function listenToKeys(graph: FlowGraph, state: TraceState, commands: KeyCommands): void {
  const selected = () => state.get('sel')
  const to = (id: string | undefined) => id && commands.select(id)
  const actions: Record<string, () => void> = {
    Escape: () => state.set({ sel: '', q: '', path: '' }),
    '[': () => to(strongestSource(graph, selected())?.id),
    ']': () => to(strongestDestination(graph, selected())?.id),
    p: () => selected() && commands.pin(selected()),
    n: () => commands.annotate(selected()),
    f: () => flip(state, 'path'),
    h: () => state.set({ map: state.get('map') === 'heads' ? '' : 'heads' }),
    t: () => state.set({ view: state.get('view') === 'table' ? '' : 'table' }),
    '/': commands.search,
    '?': commands.help,
  }
  document.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return
    if (movedFocus(event) || entered(event, commands)) return event.preventDefault()
    const action = actions[event.key]
    if (!action || document.querySelector('dialog[open]')) return
    event.preventDefault()
    action()
  })
}

/** Whether keys go into a control. */
export function typing(target: EventTarget | null): boolean {
  return (
    target instanceof HTMLInputElement ||
    target instanceof HTMLTextAreaElement ||
    target instanceof HTMLSelectElement
  )
}

/** Moves the focus to the nearest element of a picture, if an arrow key was pressed in one. */
export function movedFocus(event: KeyboardEvent): boolean {
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
