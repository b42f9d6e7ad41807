import { button, choice, exporter, press, searchBox, THEMES, toggle } from '../parts/controls'
import { element } from '../parts/dom'
import type { TraceKey, TraceState } from './state'

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
  const maps = MAPS.map(([map, words, title]) => ({
    map,
    control: toggle(words, title, () => state.set({ map })),
  }))
  const kinds = KINDS.map(([kind, words]) => ({
    kind,
    control: toggle(words, `Show or hide: ${words}`, () => flipIn(state, 'hide', kind)),
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
    for (const { map, control } of maps) press(control, state.get('map') === map)
    press(path, state.get('path') !== '')
    for (const { kind, control } of kinds) press(control, !state.list('hide').includes(kind))
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
