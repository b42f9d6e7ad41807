import { finite } from '../contract'
import { annotationKey, annotationTitle, keyNode } from '../model/annotations'
import type { FlowGraph, GraphEdge, GraphNode, Reading } from '../model/flow_graph'
import type { ContributionTree, Found } from '../model/graph_queries'
import { isolated } from '../model/tokens'
import { binOf, isFlipped, shownToken } from '../presentation/colours'
import { element, scoredList, tokenText } from '../presentation/elements'
import { contributionLines, figureName } from '../presentation/sentences'
import {
  at,
  count,
  decimals,
  measure,
  nodeName,
  percent,
  probability,
  signed,
} from '../presentation/wording'
import type { TraceState } from './controls'

// The inspector: search results, the path, pinned nodes side by side, the selected node.

const SHOWN = 60

interface Shown {
  position: number
  found: readonly Found[]
  tree: ContributionTree | undefined
  /** The measured effect of a node. */
  knockOut: (node: GraphNode) => HTMLElement | undefined
}

export function fillInspector(
  aside: HTMLElement,
  graph: FlowGraph,
  state: TraceState,
  shown: Shown,
): void {
  const sections: HTMLElement[] = []
  const query = state.get('q').trim()
  if (query !== '') sections.push(foundList(shown.found, query, graph))
  if (shown.tree) sections.push(contributionList(shown.tree, graph))
  const pinned = state.list('pin').flatMap((id) => graph.node(id) ?? [])
  const selected = graph.node(state.get('sel'))
  if (pinned.length > 0) {
    const others = selected && !pinned.includes(selected) ? [selected] : []
    sections.push(comparison([...pinned, ...others], graph))
  }
  const node = selected ?? defaultNode(graph, shown.position)
  if (node) sections.push(nodeFacts(node, graph, shown.knockOut(node)))
  if (graph.annotations.size > 0) sections.push(annotationList(graph, shown.position))
  aside.replaceChildren(...sections)
}

/** Shown while nothing is selected: the prediction. */
function defaultNode(graph: FlowGraph, position: number) {
  return (
    graph.node(`p${position}/PREDICTION`) ??
    graph.at(Math.max(...graph.layers, 0), position, 'BLOCK_OUTPUT')
  )
}

function foundList(found: readonly Found[], query: string, graph: FlowGraph): HTMLElement {
  const sorted = [...found].sort((a, b) => a.place - b.place)
  const lines: HTMLElement[] = sorted
    .slice(0, SHOWN)
    .map(({ node, end, place }) =>
      nodeLink(
        node,
        `${end === 'top' ? '▴' : '▾'} ${place}`,
        graph,
        `${nodeName(node, graph.prompt)} at ${at(node.position, graph.prompt)}`,
      ),
    )
  const title = `${count(found.length)} ${found.length === 1 ? 'node has' : 'nodes have'} “${query}” among their tokens`
  if (found.length > SHOWN) {
    lines.push(element('p', { class: 'quiet' }, `and ${found.length - SHOWN} more`))
  }
  const note = 'place among the top (▴) or bottom (▾) tokens, from 0'
  return section('found', title, note, lines)
}

function contributionList(tree: ContributionTree, graph: FlowGraph): HTMLElement {
  const lines = contributionLines(tree, graph).map(({ depth, name, contribution, part }) => {
    const line = part
      ? nodeLink(part.node, signed(contribution), graph, name)
      : element('p', { class: 'rest quiet' }, `${signed(contribution)} ${name}`)
    line.style.paddingLeft = `${depth}em`
    return line
  })
  const figure = figureName(graph)
  const note = `direct contributions to the ${figure}; each is the sum of the indented ones below it`
  return section('path', `Where the ${figure} comes from`, note, lines)
}

/** The named heads and neurons, which are links if the trace has them at the position. */
function annotationList(graph: FlowGraph, position: number): HTMLElement {
  const lines = Array.from(graph.annotations, ([key, { name, note }]) => {
    const node = graph.node(keyNode(key, position))
    const title = annotationTitle(key, name)
    const shown = node ? nodeLink(node, '', graph, title) : element('p', { class: 'quiet' }, title)
    return element('div', {}, shown, ...noteLine(note))
  })
  return section('names', 'Names and notes', 'kept in the address of this page', lines)
}

function noteLine(note: string): HTMLElement[] {
  return note === '' ? [] : [element('p', { class: 'note', dir: 'auto' }, note)]
}

/** The button that names a head or neuron. */
function annotateButton(node: GraphNode): HTMLElement[] {
  if (annotationKey(node) === undefined) return []
  const attributes = { type: 'button', class: 'button annotate', 'data-annotate': node.id }
  return [element('button', attributes, node.annotation ? 'Edit name or note' : 'Name or note')]
}

function section(
  name: string,
  title: string,
  note: string,
  lines: readonly HTMLElement[],
): HTMLElement {
  return element(
    'section',
    { class: name },
    element('h2', {}, title),
    element('p', { class: 'quiet' }, note),
    element('div', { class: 'lines' }, ...lines),
  )
}

// The facts about one node.

const SHOWN_PARTS = 8

/** All facts about a node. */
export function nodeFacts(
  node: GraphNode,
  graph: FlowGraph,
  knockOut?: HTMLElement | undefined,
): HTMLElement {
  const facts = element('section', { class: 'facts', 'data-node': node.id })
  facts.append(...nodeHeading(node, graph), ...annotateButton(node), measures(node, graph))
  if (knockOut) facts.append(knockOut)
  const { reading } = node
  if (reading) {
    facts.append(scoredList('Top tokens', reading.top, targetId(node, graph)))
    facts.append(scoredList('Bottom tokens', reading.bottom, targetId(node, graph)))
  } else {
    facts.append(
      element(
        'p',
        { class: 'quiet' },
        'No tokens: this node concatenates other nodes, or is zero.',
      ),
    )
  }
  facts.append(normEffect(node, graph), connections(node, graph))
  return facts
}

/** The node's token, name and position. */
export function nodeHeading(node: GraphNode, graph: FlowGraph): HTMLElement[] {
  const flipped = isFlipped(node)
  const shown = shownToken(node, flipped)
  const dot = element('i', { class: `dot bin-${binOf(node, graph, flipped)}` })
  const text = flipped ? '▾ negative activation: promotes the bottom tokens' : ''
  const heading = element('h2', {}, dot, tokenText(shown?.token.label ?? '—'))
  const where = element('p', { class: 'where' }, nodeName(node, graph.prompt))
  if (node.kind !== 'BLOCK_INPUT') where.append(`, at ${at(node.position, graph.prompt)}`)
  const flippedNote = text ? [element('p', { class: 'quiet' }, text)] : []
  return [heading, where, ...flippedNote, ...noteLine(node.annotation?.note ?? '')]
}

function targetId(node: GraphNode, graph: FlowGraph): number | undefined {
  return graph.targets.get(node.position)?.target.id
}

/** The numbers of a node by name, in display order. */
export function nodeNumbers(node: GraphNode, graph: FlowGraph): [string, string][] {
  const target = graph.targets.get(node.position)?.target.label ?? 'target'
  const { reading } = node
  const numbers: [string, string][] = []
  if (reading?.targetRank !== undefined) {
    const of = graph.vocabulary ? ` of ${count(graph.vocabulary)}` : ''
    numbers.push([`rank of ${isolated(target)}`, `${count(reading.targetRank)}${of}`])
  }
  if (reading?.targetProbability !== undefined) {
    const logarithm = reading.targetLogProbability
    numbers.push(['its probability', probability(reading.targetProbability, logarithm)])
    if (Number.isFinite(logarithm)) {
      numbers.push(['its log-probability', signed(finite(logarithm))])
    }
  }
  if (reading?.targetLogit !== undefined) numbers.push(['its logit', signed(reading.targetLogit)])
  const part = partOf(node, graph)
  if (part?.share !== undefined) numbers.push(['share of its sum', percent(part.share)])
  if (part?.logitContribution !== undefined) {
    numbers.push([`adds to the ${figureName(graph)}`, signed(part.logitContribution)])
  }
  if (part?.attribution !== undefined) {
    numbers.push(['attribution', signed(part.attribution)])
  }
  if (part?.attention !== undefined) numbers.push(['attention', decimals(part.attention, 3)])
  if (node.activation !== undefined) numbers.push(['activation', measure(node.activation)])
  numbers.push(['norm', measure(node.norm)])
  if (reading) numbers.push(['entropy', `${measure(reading.entropyBits)} bits`])
  return numbers
}

/** The edge from a node into the sum that it is a part of. */
export function partOf(node: GraphNode, graph: FlowGraph): GraphEdge | undefined {
  return graph.edgesFrom(node.id).find((edge) => edge.kind === 'PART')
}

function measures(node: GraphNode, graph: FlowGraph): HTMLElement {
  const rows = nodeNumbers(node, graph).map(([name, value]) =>
    element('div', {}, element('dt', {}, name), element('dd', {}, value)),
  )
  return element('dl', { class: 'measures' }, ...rows)
}

/** How a norm changed the top tokens, if the node is the output of one. */
function normEffect(node: GraphNode, graph: FlowGraph): HTMLElement {
  const before = graph.sourceBy(node.id, 'NORM')
  const [was, is] = [before?.reading, node.reading]
  if (!before || !was || !is) return element('span')
  const box = element('div', { class: 'norm-effect' }, element('h3', {}, 'Change by the norm'))
  box.append(
    line('norm', `${measure(before.norm)} → ${measure(node.norm)}`),
    line('removed', ...without(was, is).map(tokenText)),
    line('added', ...without(is, was).map(tokenText)),
  )
  return box
}

function line(name: string, ...what: (Node | string)[]): HTMLElement {
  const text = what.length > 0 ? what.flatMap((one) => [one, ' ']) : ['nothing']
  return element('p', {}, element('span', { class: 'quiet' }, `${name} `), ...text)
}

function without(some: Reading, others: Reading): string[] {
  const ids = new Set(others.top.map(({ token }) => token.id))
  return some.top.filter(({ token }) => !ids.has(token.id)).map(({ token }) => token.label)
}

function connections(node: GraphNode, graph: FlowGraph): HTMLElement {
  const list = element('div', { class: 'node-links' })
  const parts = graph.partsOf(node.id)
  if (parts.length > 0) list.append(element('h3', {}, 'Parts'))
  for (const { node: part, edge } of parts.slice(0, SHOWN_PARTS)) {
    list.append(nodeLink(part, edge.share === undefined ? '' : percent(edge.share), graph))
  }
  if (parts.length > SHOWN_PARTS) {
    list.append(element('p', { class: 'quiet' }, `and ${parts.length - SHOWN_PARTS} smaller parts`))
  }
  const onward = graph.edgesFrom(node.id).filter((edge) => graph.node(edge.target))
  if (onward.length > 0) list.append(element('h3', {}, 'Contributes to'))
  for (const edge of onward.slice(0, SHOWN_PARTS)) {
    const sum = graph.node(edge.target)
    if (sum) list.append(nodeLink(sum, edge.share === undefined ? '' : percent(edge.share), graph))
  }
  return list
}

/** A button that selects a node. */
export function nodeLink(
  node: GraphNode,
  number: string,
  graph: FlowGraph,
  name = nodeName(node, graph.prompt),
): HTMLElement {
  return element(
    'button',
    { type: 'button', class: 'node-link', 'data-id': node.id },
    element('i', { class: `dot bin-${binOf(node, graph, isFlipped(node))}` }),
    tokenText(shownToken(node, isFlipped(node))?.token.label ?? '—'),
    element('span', { class: 'what' }, name),
    element('span', { class: 'number' }, number),
  )
}

/** Two or more nodes side by side: their numbers, and the tokens that they share. */
export function comparison(nodes: readonly GraphNode[], graph: FlowGraph): HTMLElement {
  const names = new Map<string, Map<string, string>>()
  for (const node of nodes) {
    for (const [name, value] of nodeNumbers(node, graph)) {
      const row = names.get(name) ?? new Map<string, string>()
      names.set(name, row.set(node.id, value))
    }
  }
  const common = commonTokens(nodes)
  const head = element('tr', {}, element('td'), ...nodes.map((node) => pinHead(node, graph)))
  const rows = Array.from(names, ([name, values]) =>
    element(
      'tr',
      {},
      element('th', { scope: 'row' }, name),
      ...nodes.map((node) => element('td', {}, values.get(node.id) ?? '')),
    ),
  )
  const tokens = element(
    'tr',
    { class: 'tops' },
    element('th', { scope: 'row' }, 'top tokens'),
    ...nodes.map((node) => topCell(node, common)),
  )
  const table = element(
    'table',
    {},
    element('thead', {}, head),
    element('tbody', {}, ...rows, tokens),
  )
  return element('section', { class: 'comparison' }, element('h2', {}, 'Pinned'), table)
}

function pinHead(node: GraphNode, graph: FlowGraph): HTMLElement {
  return element(
    'th',
    { scope: 'col' },
    element(
      'button',
      { type: 'button', class: 'node-link', 'data-id': node.id },
      element('i', { class: `dot bin-${binOf(node, graph, isFlipped(node))}` }),
      element('span', { class: 'what' }, nodeName(node, graph.prompt)),
    ),
    element(
      'button',
      { type: 'button', class: 'unpin', 'data-unpin': node.id, 'aria-label': 'unpin' },
      '×',
    ),
  )
}

function topCell(node: GraphNode, common: ReadonlySet<number>): HTMLElement {
  const tokens = (node.reading?.top ?? []).map(({ token }) =>
    element('div', { class: common.has(token.id) ? 'common' : '' }, tokenText(token.label)),
  )
  return element('td', {}, ...tokens)
}

function commonTokens(nodes: readonly GraphNode[]): Set<number> {
  const seen = new Map<number, number>()
  for (const node of nodes) {
    for (const { token } of node.reading?.top ?? []) {
      seen.set(token.id, (seen.get(token.id) ?? 0) + 1)
    }
  }
  return new Set([...seen].filter(([, times]) => times > 1).map(([id]) => id))
}

/** The tooltip of a node. */
export function preview(node: GraphNode, graph: FlowGraph): Node[] {
  const tops = (node.reading?.top ?? []).slice(0, 4).map(({ token }) => tokenText(token.label))
  const numbers = nodeNumbers(node, graph)
    .slice(0, 5)
    .map(([name, value]) => element('span', {}, `${name} `, element('b', {}, value)))
  return [
    ...nodeHeading(node, graph),
    element('p', { class: 'tops' }, ...tops),
    element('p', { class: 'numbers' }, ...numbers),
  ]
}
