import { element } from './dom'

/** A button that does one thing. */
export function button(words: string, title: string, act: () => void): HTMLButtonElement {
  const made = element('button', { type: 'button', class: 'button', title }, words)
  made.addEventListener('click', act)
  return made
}

/** A button that is on or off; `pressed` says which, whenever the state changes. */
export function toggle(words: string, title: string, act: () => void): HTMLButtonElement {
  const made = button(words, title, act)
  made.setAttribute('aria-pressed', 'false')
  return made
}

export function press(toggled: HTMLButtonElement, on: boolean): void {
  toggled.setAttribute('aria-pressed', String(on))
}

/** One of a few values. */
export function choice(
  name: string,
  options: readonly (readonly [value: string, words: string])[],
  act: (value: string) => void,
): HTMLSelectElement {
  const made = element('select', { class: 'choice', 'aria-label': name, title: name })
  made.append(...options.map(([value, words]) => element('option', { value }, words)))
  made.addEventListener('change', () => act(made.value))
  return made
}

/** Light, dark, or as the system has it. */
export const THEMES = [
  ['', 'system'],
  ['light', 'light'],
  ['dark', 'dark'],
] as const

const EXPORTS = [
  ['', 'export'],
  ['json', 'JSON lines'],
  ['svg', 'SVG'],
  ['png', 'PNG'],
] as const

/** A choice of a format that is done and forgotten. */
export function exporter(exportAs: (format: string) => void): HTMLSelectElement {
  const made = choice('Export', EXPORTS, (format) => {
    exportAs(format)
    made.value = ''
  })
  return made
}

export function searchBox(search: (query: string) => void): HTMLInputElement {
  const made = element('input', {
    type: 'search',
    class: 'search',
    placeholder: 'Where is … ?',
    'aria-label': 'Search a token, or an id as #17',
  })
  made.addEventListener('input', () => search(made.value))
  return made
}
