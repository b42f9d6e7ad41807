import type { FlowGraph, GraphNode } from '../model/flow_graph'
import type { Token } from '../model/tokens'

// Number formats and names, the same as in the CLI.

const NOT_FINITE = 'not finite'

/** `0.992`, `0.001`, `8e-10`: three decimals, or scientific notation for small values. */
export function probability(value: number): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  if (value >= 0.0005 || value === 0) return value.toFixed(3)
  return value.toExponential(0).replace(/-(\d)$/, '-0$1')
}

export function signed(value: number, digits = 2): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  return `${value < 0 ? '−' : '+'}${Math.abs(value).toFixed(digits)}`
}

/** A share of a sum: `43 %`, `−3 %`, `0.2 %`. */
export function percent(share: number): string {
  if (!Number.isFinite(share)) return NOT_FINITE
  const size = Math.abs(share * 100)
  const digits = size >= 9.95 || size === 0 ? 0 : size >= 0.095 ? 1 : 2
  return `${share < 0 ? '−' : ''}${size.toFixed(digits)} %`
}

/** A fixed number of decimals: `0.93`. */
export function decimals(value: number, digits: number): string {
  return Number.isFinite(value) ? value.toFixed(digits) : NOT_FINITE
}

/** An integer with thin spaces between thousands. */
export function count(value: number): string {
  return String(value).replace(/\B(?=(\d{3})+$)/g, '\u2009')
}

/** Three (or `digits`) significant digits: `21.7`, `0.0526`, `6.05e-05`. */
export function measure(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  if (value === 0) return '0'
  if (Math.abs(value) >= 1e-4) return String(Number(value.toPrecision(digits)))
  return String(Number(value.toPrecision(digits)).toExponential()).replace(/-(\d)$/, '-0$1')
}

// The names of the kinds, as the client has them in `_presentation.py`.
const NAMES: Record<string, string> = {
  BLOCK_INPUT: 'embedding',
  ATTENTION_INPUT: 'attention’s input',
  QUERY: 'query',
  KEY: 'key',
  VALUE: 'value',
  HEAD_QUERY: 'query',
  HEAD_KEY: 'key',
  HEAD_VALUE: 'value',
  MEMORY_KEY: 'key',
  MEMORY_VALUE: 'value',
  HEAD_OUTPUT: 'output',
  ATTENTION_CONCAT: 'all heads together',
  ATTENTION_NEURON: 'row of W_O',
  ATTENTION_BIAS: 'attention’s bias',
  ATTENTION_SUM: 'attention’s raw result',
  ATTENTION_OUTPUT: 'attention’s result',
  RESIDUAL_MID: 'residual after attention',
  MLP_INPUT: 'MLP’s input',
  MLP_KEY: 'key',
  MLP_UP: 'up column',
  MLP_VALUE: 'value',
  MLP_BIAS: 'MLP’s bias',
  MLP_SUM: 'MLP’s raw result',
  MLP_OUTPUT: 'MLP’s result',
  BLOCK_OUTPUT: 'residual after the block',
  FINAL_NORM: 'after the final norm',
  PREDICTION: 'prediction',
  OTHER: 'all the rest',
}

/** `L2 head 3 value of ␣Japan (3)`, without the node's own position. */
export function nodeName(node: GraphNode, prompt: readonly Token[]): string {
  const text: string[] = []
  if (node.layer !== undefined) text.push(`L${node.layer}`)
  if (node.head !== undefined) text.push(`head ${node.head}`)
  if (node.expert !== undefined) text.push(`expert ${node.expert}`)
  if (node.neuron !== undefined) text.push(`neuron ${node.neuron}`)
  text.push(NAMES[node.kind] ?? node.kind.toLowerCase())
  const source = node.kind === 'BLOCK_INPUT' ? node.position : node.source
  if (source !== undefined) text.push(`of ${at(source, prompt)}`)
  return text.join(' ')
}

/** `␣Japan (3)`: the token at a position, and the position. */
export function at(position: number, prompt: readonly Token[]): string {
  const token = prompt[position]
  return token ? `${token.label} (${position})` : `(${position})`
}

/** A description for screen readers: name, position, top token, rank of the target. */
export function nodeSentence(node: GraphNode, graph: FlowGraph): string {
  const parts = [nodeName(node, graph.prompt), `at ${at(node.position, graph.prompt)}`]
  const top = node.reading?.top[0]
  if (top) parts.push(`top ${top.token.label}`)
  const rank = node.reading?.targetRank
  if (rank !== undefined) {
    parts.push(`rank ${rank} of ${graph.targets.get(node.position)?.target.label ?? 'the target'}`)
  }
  return parts.join(', ')
}
