import { type Direction, neighbour } from '../parts/focus'
import { type GradientState, placeOf } from './state'
import type { Commands } from './toolbar'

export const KEYS = [
  ['← → ↑ ↓', 'to the neighbour'],
  ['Enter', 'select it'],
  ['Esc', 'let go'],
  ['e', 'both ends, the top, the bottom'],
  ['/', 'search'],
  ['?', 'these keys'],
] as const

const ENDS = ['', 'top', 'bottom']

/** What the keyboard does, wherever nobody is typing. */
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
    if (picture) neighbour(picture, target, key as Direction)?.focus()
    return true
  }
  if (target instanceof SVGElement && (key === 'Enter' || key === ' ')) {
    const id = target.dataset.id ?? ''
    if (placeOf(id)) state.set({ sel: id })
    return true
  }
  if (key === 'Escape') state.set({ sel: '', q: '' })
  else if (key === 'e') state.set({ ends: ENDS[(ENDS.indexOf(state.get('ends')) + 1) % 3] ?? '' })
  else if (key === '/') commands.search()
  else if (key === '?') commands.help()
  else return false
  return true
}
