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
