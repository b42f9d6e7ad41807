import type { ProvenanceMessage } from '../contract'
import { finite } from '../contract'
import type { Scored } from '../model/flow_graph'
import { directionOf, type Piece, piecesOf, type Token } from '../model/tokens'
import { probability, signed } from './wording'

/** Creates an element with attributes and children; strings become text, never markup. */
export function element<Name extends keyof HTMLElementTagNameMap>(
  name: Name,
  attributes: Readonly<Record<string, string>> = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[Name] {
  const made = document.createElement(name)
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value)
  made.append(...children)
  return made
}

/** A token's label, isolated so that right-to-left text does not reorder the text around it. */
export function tokenText(label: string): HTMLElement {
  return element('bdi', { class: 'token' }, label)
}

/** An element that its summary opens and closes, and that Escape closes from inside. */
export function disclosure(
  name: string,
  summary: HTMLElement,
  ...content: HTMLElement[]
): HTMLDetailsElement {
  const made = element('details', { class: name }, summary, ...content)
  made.addEventListener('keydown', ({ key }) => {
    if (key !== 'Escape' || !made.open) return
    made.open = false
    summary.focus()
  })
  return made
}

/** A push button. */
export function button(text: string, title: string, act: () => void): HTMLButtonElement {
  const made = element('button', { type: 'button', class: 'button', title }, text)
  made.addEventListener('click', act)
  return made
}

/** A toggle button; `setPressed` updates it. */
export function toggle(text: string, title: string, act: () => void): HTMLButtonElement {
  const made = button(text, title, act)
  made.setAttribute('aria-pressed', 'false')
  return made
}

export function setPressed(toggled: HTMLButtonElement, on: boolean): void {
  toggled.setAttribute('aria-pressed', String(on))
}

/** A drop-down list. */
export function choice(
  name: string,
  options: readonly (readonly [value: string, text: string])[],
  act: (value: string) => void,
): HTMLSelectElement {
  const made = element('select', { class: 'choice', 'aria-label': name, title: name })
  made.append(...options.map(([value, text]) => element('option', { value }, text)))
  made.addEventListener('change', () => act(made.value))
  return made
}

/** Options of the theme. */
export const THEMES = [
  ['', 'system'],
  ['light', 'light'],
  ['dark', 'dark'],
] as const

export function searchBox(search: (query: string) => void): HTMLInputElement {
  const made = element('input', {
    type: 'search',
    class: 'search',
    placeholder: 'Search for a token',
    'aria-label': 'Search for a token by text, or by id as #17',
  })
  made.addEventListener('input', () => search(made.value))
  return made
}

/** A dialog that lists the keyboard shortcuts. */
export function helpDialog(keys: readonly (readonly [string, string])[]): HTMLDialogElement {
  const rows = keys.map(([key, what]) =>
    element(
      'tr',
      {},
      element('th', { scope: 'row' }, ...key.split(' ').map((k) => element('kbd', {}, k))),
      element('td', {}, what),
    ),
  )
  const close = element('button', { type: 'button', class: 'button' }, 'Close')
  const dialog = element(
    'dialog',
    { class: 'help', 'aria-labelledby': 'help-title' },
    element('h2', { id: 'help-title' }, 'Keys'),
    element('table', {}, element('tbody', {}, ...rows)),
    close,
  )
  close.addEventListener('click', () => dialog.close())
  document.body.append(dialog)
  return dialog
}

/** A box that follows the pointer; the inspector shows the same facts in full. */
export class Tooltip {
  private readonly box = element('div', { class: 'tooltip', role: 'presentation' })

  constructor() {
    this.box.hidden = true
    document.body.append(this.box)
  }

  show(content: readonly Node[], x: number, y: number): void {
    this.box.replaceChildren(...content)
    this.box.hidden = false
    const { width, height } = this.box.getBoundingClientRect()
    const left = x + 16 + width > window.innerWidth ? x - width - 12 : x + 16
    const top = y + 18 + height > window.innerHeight ? y - height - 12 : y + 18
    this.box.style.transform = `translate(${Math.max(4, left)}px, ${Math.max(4, top)}px)`
  }

  hide(): void {
    this.box.hidden = true
  }
}

const BEFORE = 100 // characters shown of a long prompt before a position
const AFTER = 40

/** The prompt as text in its own direction, shortened to the tokens around a position. */
export function promptText(prompt: readonly Token[], position: number): HTMLElement {
  const pieces = piecesOf(prompt)
  const at = pieces.findIndex((piece) => piece.last >= position)
  const before = fitting(pieces.slice(0, at + 1).reverse(), BEFORE)
  const first = at + 1 - before
  const last = at + fitting(pieces.slice(at + 1), AFTER)
  const shown = pieces.slice(first, last + 1).map(inPrompt)
  shown[at - first]?.classList.add('selected')
  if (first > 0) shown.unshift(element('span', { class: 'arrow' }, '… '))
  if (last + 1 < pieces.length) shown.push(element('span', { class: 'arrow' }, ' …'))
  return element('bdi', { class: 'prompt', dir: directionOf(prompt) }, ...shown)
}

const JOINERS = /[\u200c\u200d]/g // of letters and of emoji
const SHOWN_JOINERS = /<U\+200[CD]>/g

/**
 * A piece of a prompt. Plain text is not isolated: its letters join, its marks combine and its digits
 * keep their order across tokens, as in any text. A label that stands for something else is.
 */
function inPrompt({ label, text }: Piece): HTMLElement {
  const shown = label.replace(/^␣/, ' ')
  const letters = shown.replace(SHOWN_JOINERS, '').replace(/^◌/, '')
  const plain = text !== '' && letters === text.replace(JOINERS, '')
  return plain ? element('span', { class: 'token' }, text) : tokenText(shown)
}

/** How many of the first pieces have at most this many characters together, at least one. */
function fitting(pieces: readonly Piece[], characters: number): number {
  let room = characters
  const over = pieces.findIndex(({ label }, i) => {
    room -= label.length
    return i > 0 && room < 0
  })
  return over < 0 ? pieces.length : over
}

/** The model, revision and version that produced the result, and whether it is complete. */
export function provenanceLine(provenance: ProvenanceMessage, complete: boolean): HTMLElement {
  const { model, architecture, dataType, device, revision, versions, quantization, lora } =
    provenance
  const text = [
    `model ${model ?? ''}`,
    architecture,
    quantization ? `${dataType}, from ${quantization}` : dataType,
    device,
    lora ? `with a LoRA of ${lora}` : '',
    `revision ${(revision ?? '').slice(0, 12)}`,
    `januslens ${versions?.januslens ?? ''}`,
  ]
  const line = element('p', { class: 'provenance' }, text.filter(Boolean).join(' · '))
  if (!complete) line.append(element('strong', { class: 'incomplete' }, ' · incomplete'))
  return line
}

/** A token that becomes the target when clicked. */
export function targetButton(token: Token): HTMLElement {
  const what = `Use token ${token.id} as the target`
  const attributes = {
    type: 'button',
    class: 'target-choice',
    'data-target': String(token.id),
    title: what,
  }
  return element('button', attributes, tokenText(token.label))
}

/** A table of tokens with probabilities and logits; the target is emphasised. */
export function scoredList(
  title: string,
  scored: readonly Scored[],
  target: number | undefined,
): HTMLElement {
  if (scored.length === 0) return element('span')
  const rows = scored.map(({ token, probability: p, logit, logProbability }) => {
    const bar = element('span', { class: 'bar' })
    bar.style.setProperty('--share', String(finite(p)))
    return element(
      'tr',
      token.id === target ? { class: 'target' } : {},
      element(
        'th',
        { scope: 'row' },
        token.id === target ? tokenText(token.label) : targetButton(token),
      ),
      element('td', { class: 'bar-cell' }, bar),
      element(
        'td',
        { title: `log-probability ${signed(logProbability)}` },
        probability(p, logProbability),
      ),
      element('td', { title: 'logit', class: 'quiet' }, signed(logit, 1)),
    )
  })
  return element(
    'table',
    { class: 'scored' },
    element('caption', {}, title),
    element('tbody', {}, ...rows),
  )
}
