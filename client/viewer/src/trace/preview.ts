import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'
import { element, tokenText } from '../parts/dom'
import { nodeHeading, numbersOf } from '../parts/inspector'

/** What the tooltip says of a node. */
export function preview(node: GraphNode, graph: FlowGraph): Node[] {
  const tops = (node.reading?.top ?? []).slice(0, 4).map(({ token }) => tokenText(token.label))
  const numbers = numbersOf(node, graph)
    .slice(0, 5)
    .map(([name, value]) => element('span', {}, `${name} `, element('b', {}, value)))
  return [
    ...nodeHeading(node, graph),
    element('p', { class: 'tops' }, ...tops),
    element('p', { class: 'numbers' }, ...numbers),
  ]
}
