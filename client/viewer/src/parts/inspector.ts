import { rankBin } from '../colour/bins'
import type { FlowGraph } from '../graph/graph'
import type { GraphNode, Reading, Scored } from '../graph/nodes'
import { element, tokenText } from './dom'
import { measure, percent, probability, signed } from './numbers'
import { inWords } from './words'

/** Everything that is known of a node: what the inspector shows, and half of a comparison. */
export function nodeFacts(node: GraphNode, graph: FlowGraph): HTMLElement {
  const facts = element('section', { class: 'facts' })
  const top = node.reading?.top[0]
  const bin = rankBin(node.reading?.targetRank, graph.vocabulary)
  facts.append(
    element(
      'h2',
      {},
      tokenText(top?.token.label ?? '—'),
      element('i', { class: `dot bin-${bin}` }),
    ),
    element('p', { class: 'where' }, inWords(node, graph.prompt)),
    measures(node, graph),
  )
  if (node.reading) facts.append(...readingLists(node.reading))
  facts.append(edgesOf(node, graph))
  return facts
}

function measures(node: GraphNode, graph: FlowGraph): HTMLElement {
  const list = element('dl', { class: 'measures' })
  const add = (name: string, value: string) =>
    list.append(element('div', {}, element('dt', {}, name), element('dd', {}, value)))
  const target = graph.targets.get(node.position)?.target.label ?? 'target'
  const reading = node.reading
  if (reading?.targetRank !== undefined) add(`rank of ${target}`, String(reading.targetRank))
  if (reading?.targetProbability !== undefined)
    add('its probability', probability(reading.targetProbability))
  if (reading?.targetLogit !== undefined) add('its logit', signed(reading.targetLogit))
  add('norm', measure(node.norm))
  if (node.activation !== undefined) add('activation', measure(node.activation))
  if (reading) add('entropy', `${measure(reading.entropyBits)} bits`)
  return list
}

function readingLists(reading: Reading): HTMLElement[] {
  const lists: HTMLElement[] = []
  if (reading.top.length > 0) lists.push(scoredList('Top tokens', reading.top))
  if (reading.bottom.length > 0) lists.push(scoredList('Bottom tokens', reading.bottom))
  return lists
}

function scoredList(title: string, scored: readonly Scored[]): HTMLElement {
  const rows = scored.map(({ token, probability: p, logit }) => {
    const bar = element('span', { class: 'bar' })
    bar.style.setProperty('--share', String(p))
    return element(
      'tr',
      {},
      element('td', {}, tokenText(token.label)),
      element('td', {}, bar),
      element('td', {}, probability(p)),
      element('td', { title: 'logit' }, signed(logit, 1)),
    )
  })
  return element(
    'table',
    { class: 'scored' },
    element('caption', {}, title),
    element('tbody', {}, ...rows),
  )
}

function edgesOf(node: GraphNode, graph: FlowGraph): HTMLElement {
  const list = element('div', { class: 'ways' })
  const into = graph.partsOf(node.id).slice(0, 6)
  if (into.length > 0) list.append(element('h3', {}, 'Made of'))
  for (const { node: part, edge } of into) list.append(way(part, edge.share, graph))
  const from = graph.edgesFrom(node.id).filter((edge) => edge.kind === 'PART')
  if (from.length > 0) list.append(element('h3', {}, 'Part of'))
  for (const edge of from) {
    const sum = graph.node(edge.target)
    if (sum) list.append(way(sum, edge.share, graph))
  }
  return list
}

function way(node: GraphNode, share: number | undefined, graph: FlowGraph): HTMLElement {
  return element(
    'button',
    { type: 'button', class: 'way', 'data-id': node.id },
    element('span', {}, inWords(node, graph.prompt)),
    tokenText(node.reading?.top[0]?.token.label ?? ''),
    element('span', { class: 'number' }, share === undefined ? '' : percent(share)),
  )
}
