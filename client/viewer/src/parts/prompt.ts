import type { Token } from '../label/tokens'
import { element, tokenText } from './dom'

const SHOWN = 40 // tokens of a long prompt, around the position

/** The prompt as running text; of a long one what stands around a position. */
export function promptText(prompt: readonly Token[], position: number): HTMLElement[] {
  const from = Math.max(0, Math.min(position - SHOWN / 2, prompt.length - SHOWN))
  const tokens: HTMLElement[] = prompt.slice(from, from + SHOWN).map((token, i) => {
    const shown = tokenText(token.label.replace(/^␣/, ' '))
    if (from + i === position) shown.classList.add('selected')
    return shown
  })
  if (from > 0) tokens.unshift(element('span', { class: 'arrow' }, '… '))
  if (from + SHOWN < prompt.length) tokens.push(element('span', { class: 'arrow' }, ' …'))
  return tokens
}
