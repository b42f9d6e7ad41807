import type { FlowGraph } from '../graph/graph'
import { element, tokenText } from '../parts/dom'
import { provenanceLine } from '../parts/provenance'
import { story } from './story'

const SHOWN = 40 // tokens of a long prompt, around the position

/** The prompt, what came of it, and which weights said so. */
export function fillHeader(heading: HTMLElement, graph: FlowGraph, position: number): void {
  const from = Math.max(0, Math.min(position - SHOWN / 2, graph.prompt.length - SHOWN))
  const tokens: Node[] = graph.prompt.slice(from, from + SHOWN).map((token, i) => {
    const shown = tokenText(token.label.replace(/^␣/, ' '))
    if (from + i === position) shown.classList.add('selected')
    return shown
  })
  if (from > 0) tokens.unshift(element('span', { class: 'arrow' }, '… '))
  if (from + SHOWN < graph.prompt.length) tokens.push(element('span', { class: 'arrow' }, ' …'))
  const target = graph.targets.get(position)?.target
  const title = element('h1', {}, ...tokens)
  if (target) title.append(element('span', { class: 'arrow' }, ' → '), tokenText(target.label))
  title.lastElementChild?.classList.add('answer')
  heading.replaceChildren(
    title,
    story(graph, position),
    provenanceLine(graph.provenance, graph.complete),
  )
}
