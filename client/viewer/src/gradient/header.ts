import { element, tokenText } from '../parts/dom'
import { probability } from '../parts/numbers'
import { promptText } from '../parts/prompt'
import { provenanceLine } from '../parts/provenance'
import type { GradientModel } from './model'

/** The prompt, what is to be learnt, and which weights would learn it. */
export function fillHeader(heading: HTMLElement, model: GradientModel, position: number): void {
  const targets = model.targets.map((token) => {
    const shown = tokenText(token.label)
    shown.classList.add('answer')
    return shown
  })
  const arrow = element('span', { class: 'arrow' }, ' ⇐ ')
  const title = element('h1', {}, ...promptText(model.prompt, position), arrow, ...targets)
  heading.replaceChildren(title, story(model), provenanceLine(model.provenance, model.complete))
}

function story(model: GradientModel): HTMLElement {
  const story = element('p', { class: 'story' })
  story.append(
    `Loss ${model.loss.toPrecision(4)}`,
    model.targets.length === 1 ? `, so probability ${probability(Math.exp(-model.loss))}` : '',
    '; the model predicts ',
    tokenText(model.predicted?.label ?? ''),
    '. A descent step adds −learning rate · xᵀδ: it imprints x on what reads, and shifts what is ',
    'written towards the other end of δ’s ranking. ▲ top and ▼ bottom tokens; what a step ',
    'promotes is bold.',
  )
  if (model.skipped.length > 0) {
    story.append(` Not in this architecture: ${model.skipped.join(', ')}.`)
  }
  return story
}
