import type { FlowGraph } from '../graph/graph'
import { element, tokenText } from '../parts/dom'
import { promptText } from '../parts/prompt'
import { provenanceLine } from '../parts/provenance'
import { story } from './story'

/** The prompt, what came of it, and which weights said so. */
export function fillHeader(heading: HTMLElement, graph: FlowGraph, position: number): void {
  const target = graph.targets.get(position)?.target
  const title = element('h1', {}, ...promptText(graph.prompt, position))
  if (target) title.append(element('span', { class: 'arrow' }, ' → '), tokenText(target.label))
  title.lastElementChild?.classList.add('answer')
  heading.replaceChildren(
    title,
    story(graph, position),
    provenanceLine(graph.provenance, graph.complete),
  )
}
