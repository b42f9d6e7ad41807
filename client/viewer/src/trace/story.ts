// The trace in a sentence or two, as the command tells it.
import type { FlowGraph } from '../graph/graph'
import type { GraphEdge, GraphNode } from '../graph/nodes'
import { element, tokenText } from '../parts/dom'
import { probability, signed } from '../parts/numbers'
import { at } from '../parts/words'
import { type Answer, answerAppears, residuals } from './answer'

export function story(graph: FlowGraph, position: number): HTMLElement {
  const target = graph.targets.get(position)
  const line = element('p', { class: 'story' })
  if (!target) return line
  const rank = target.rank === 0 ? 'the model’s own prediction' : `rank ${target.rank}`
  line.append(
    tokenText(target.target.label),
    ` after ${at(position, graph.prompt)}: ${rank}, probability ${probability(target.probability)}. `,
    emergence(answerAppears(graph, position), residuals(graph, position)),
  )
  for (const [kind, name] of [
    ['HEAD_OUTPUT', 'head'],
    ['MLP_VALUE', 'neuron'],
  ] as const) {
    const best = strongest(graph, position, kind)
    if (best) line.append(' ', contributor(best.node, name), ` adds ${signed(best.logit)}`)
    if (best && kind === 'HEAD_OUTPUT') line.append(reading(graph, best.node))
    if (best) line.append('.')
  }
  return line
}

function emergence(answer: Answer | undefined, steps: readonly GraphNode[]): string {
  if (answer?.layer !== undefined) {
    const step = answer.step === 'block' ? '' : `’s ${answer.step}`
    return `On top for good after layer ${answer.layer}${step}.`
  }
  if (answer) return 'On top for good after the embedding.'
  const ranks = steps.map((node) => node.reading?.targetRank ?? Number.POSITIVE_INFINITY)
  return ranks.length > 0 ? `Best rank on the way: ${Math.min(...ranks)}.` : ''
}

function contributor(node: GraphNode, name: string): HTMLElement {
  const number = name === 'head' ? node.head : node.neuron
  return element(
    'button',
    { type: 'button', class: 'inline', 'data-id': node.id },
    `L${node.layer} ${name} ${number}`,
  )
}

function reading(graph: FlowGraph, head: GraphNode): string {
  let most: GraphEdge | undefined
  for (const { edge } of graph.partsOf(head.id)) {
    if ((edge.attention ?? 0) > (most?.attention ?? 0)) most = edge
  }
  const source = most && graph.node(most.source)?.source
  if (source === undefined) return ''
  return `, reading ${at(source, graph.prompt)} with attention ${(most?.attention ?? 0).toFixed(2)}`
}

/** The node of one kind that adds most to the target's logit at a position. */
function strongest(graph: FlowGraph, position: number, kind: string) {
  let best: { node: GraphNode; logit: number } | undefined
  for (const node of graph.nodes.values()) {
    if (node.kind !== kind || node.position !== position) continue
    for (const edge of graph.edgesFrom(node.id)) {
      const logit = edge.logitContribution
      if (logit !== undefined && (!best || logit > best.logit)) best = { node, logit }
    }
  }
  return best
}
