import { finite } from '../contract'
import type { FlowGraph, GraphNode, Part } from '../model/flow_graph'

// The contents of one layer at one position, collected from the flow graph.

/** A source position that a head attends to, with its key and value. */
export interface Source {
  position: number
  key: GraphNode | undefined
  value: GraphNode
  attention: number
  share: number | undefined
}

/** One part of a sum, drawn as a row with a ribbon into the sum's bar. */
export interface Row {
  node: GraphNode
  share: number | undefined
  logit: number | undefined
}

export interface HeadRow extends Row {
  head: number
  query: GraphNode | undefined
  sources: Source[]
  rest: Part | undefined
  /** The head's W_O rows in the graph, with shares of attention's output. */
  outputRows: Row[]
}

export interface NeuronRow extends Row {
  key: GraphNode | undefined
  up: GraphNode | undefined
}

/** A sum and the rows that add up to it, from top to bottom. */
export interface Block<Item extends Row> {
  input: GraphNode | undefined
  rows: Item[]
  rest: Row | undefined
  bias: Row | undefined
  /** The sum to which the rows' shares refer. */
  sum: GraphNode | undefined
  /** The vector added to the residual. */
  output: GraphNode | undefined
  /** The output's share of the residual after the addition. */
  outputShare: number | undefined
  outputLogit: number | undefined
}

export interface LayerModel {
  layer: number
  position: number
  before: GraphNode | undefined
  /** The residual between attention and MLP; undefined in parallel blocks. */
  mid: GraphNode | undefined
  after: GraphNode | undefined
  /** The previous residual's share in `mid` and in `after`. */
  keptByMid: number | undefined
  keptByAfter: number | undefined
  /** Attention or a mixer; undefined if the layer has neither. */
  attention: Block<HeadRow> | undefined
  mlp: Block<NeuronRow> | undefined
}

export function layerModel(graph: FlowGraph, layer: number, position: number): LayerModel {
  const at = (kind: string) => graph.at(layer, position, kind)
  const mid = at('RESIDUAL_MID')
  const after = at('BLOCK_OUTPUT')
  const added = ['ATTENTION_OUTPUT', 'MIXER_OUTPUT', 'MLP_OUTPUT', 'RESIDUAL_MID']
  const kept = (sum: GraphNode | undefined) =>
    sum && graph.partsOf(sum.id).find(({ node }) => !added.includes(node.kind))
  const before = kept(mid ?? after)
  return {
    layer,
    position,
    before: before?.node,
    mid,
    after,
    keptByMid: mid && before?.edge.share,
    keptByAfter: mid ? shareIn(graph, mid, after) : before?.edge.share,
    attention: existing(attentionBlock(graph, layer, position)),
    mlp: existing(mlpBlock(graph, layer, position)),
  }
}

/** A block of which the graph has a part or the result. */
function existing<Item extends Row>(block: Block<Item>): Block<Item> | undefined {
  return block.output || block.sum ? block : undefined
}

function shareIn(
  graph: FlowGraph,
  part: GraphNode | undefined,
  sum: GraphNode | undefined,
): number | undefined {
  if (!part || !sum) return undefined
  return graph.partsOf(sum.id).find(({ node }) => node.id === part.id)?.edge.share
}

function attentionBlock(graph: FlowGraph, layer: number, position: number): Block<HeadRow> {
  const at = (kind: string) => graph.at(layer, position, kind)
  const concat = at('ATTENTION_CONCAT')
  const mixer = at('MIXER_OUTPUT')
  const parts = [concat ?? mixer].flatMap((sum) => (sum ? graph.partsOf(sum.id) : []))
  const kind = concat ? 'HEAD_OUTPUT' : 'MIXER_HEAD'
  const result = at('ATTENTION_SUM') ?? at('ATTENTION_OUTPUT')
  const written = result ? graph.partsOf(result.id) : []
  const bias = written.find((p) => p.node.kind === 'ATTENTION_BIAS')
  const neurons = written.filter((p) => p.node.kind === 'ATTENTION_NEURON')
  return {
    input: at('ATTENTION_INPUT'),
    rows: parts.filter((p) => p.node.kind === kind).map((p) => headRow(graph, p, neurons)),
    rest: rowOf(parts.find((p) => p.node.kind === 'OTHER')),
    bias: rowOf(bias),
    sum: concat ?? (parts.length > 0 ? mixer : undefined),
    ...outputOf(graph, at('ATTENTION_OUTPUT') ?? mixer),
  }
}

function headRow(graph: FlowGraph, part: Part, neurons: readonly Part[]): HeadRow {
  const { node } = part
  const parts = graph.partsOf(node.id)
  const sources = parts
    .filter((value) => value.node.kind === 'MEMORY_VALUE')
    .map((value) => ({
      position: value.node.source ?? 0,
      key: graph.sourceBy(value.node.id, 'RECALL'),
      value: value.node,
      attention: value.edge.attention ?? 0,
      share: value.edge.share,
    }))
    .sort((a, b) => finite(b.attention) - finite(a.attention))
  return {
    ...row(part),
    head: node.head ?? 0,
    query: graph.node(`L${node.layer}/p${node.position}/HEAD_QUERY/h${node.head}`),
    sources,
    rest: parts.find((value) => value.node.kind === 'OTHER'),
    outputRows: neurons.filter((p) => graph.headOf(p.node) === node.head).map(row),
  }
}

function mlpBlock(graph: FlowGraph, layer: number, position: number): Block<NeuronRow> {
  const at = (kind: string) => graph.at(layer, position, kind)
  const sum = at('MLP_SUM') ?? at('MLP_OUTPUT')
  const parts = sum ? graph.partsOf(sum.id) : []
  return {
    input: at('MLP_INPUT'),
    rows: parts.filter((p) => p.node.kind === 'MLP_VALUE').map((p) => neuronRow(graph, p)),
    rest: rowOf(parts.find((p) => p.node.kind === 'OTHER')),
    bias: rowOf(parts.find((p) => p.node.kind === 'MLP_BIAS')),
    sum,
    ...outputOf(graph, at('MLP_OUTPUT')),
  }
}

function neuronRow(graph: FlowGraph, part: Part): NeuronRow {
  const activators = graph
    .edgesInto(part.node.id)
    .filter((edge) => edge.kind === 'ACTIVATE')
    .map((edge) => graph.node(edge.source))
  return {
    ...row(part),
    key: activators.find((node) => node?.kind === 'MLP_KEY'),
    up: activators.find((node) => node?.kind === 'MLP_UP'),
  }
}

function outputOf(graph: FlowGraph, output: GraphNode | undefined) {
  const edge = output && graph.edgesFrom(output.id).find((e) => e.kind === 'PART')
  return { output, outputShare: edge?.share, outputLogit: edge?.logitContribution }
}

function rowOf(part: Part | undefined): Row | undefined {
  return part && row(part)
}

function row({ node, edge }: Part): Row {
  return { node, share: edge.share, logit: edge.logitContribution }
}
