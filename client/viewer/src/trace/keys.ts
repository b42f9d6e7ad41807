import type { FlowGraph } from '../graph/graph'
import { type Direction, neighbour } from '../parts/focus'
import type { TraceState } from './state'
import { flip } from './toolbar'
import { strongestDestination, strongestSource } from './ways'

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

interface Commands {
  select: (id: string) => void
  pin: (id: string) => void
  openHead: (head: string) => void
  help: () => void
  search: () => void
}

/** What the keyboard does, wherever nobody is typing. */
export function listenToKeys(graph: FlowGraph, state: TraceState, commands: Commands): void {
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
  const next = picture && neighbour(picture, from, event.key as Direction)
  next?.focus()
  return true
}

function entered(event: KeyboardEvent, commands: Commands): boolean {
  if (event.key !== 'Enter' || !(event.target instanceof SVGElement)) return false
  const { id, head } = event.target.dataset
  if (id) commands.select(id)
  if (head) commands.openHead(head)
  return id !== undefined || head !== undefined
}
