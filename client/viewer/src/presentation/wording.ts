import type { WaitingMessage } from '../contract'
import type { FlowGraph, GraphNode } from '../model/flow_graph'
import { fitted, isolated, type Token } from '../model/tokens'

// Number formats and names, the same as in the client's `_presentation.py` except that pages have the
// typographic minus and apostrophe; tests/fixtures/presentation/ holds both sides to it.

const NOT_FINITE = 'not finite'
const MINUS = '−'
const LARGE = 1e6 // from here on numbers are in scientific notation

/**
 * `0.992`, `0.001`, `8e-10`: three decimals, or one digit where those would show zero. A probability
 * that underflows is a power of e, if its logarithm is known: `e^−118`.
 */
export function probability(value: number, logarithm = Number.NaN): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  if (value === 0 && Number.isFinite(logarithm)) return `e^${MINUS}${fixed(Math.abs(logarithm), 0)}`
  return value >= 0.0005 || value === 0 ? fixed(value, 3) : twoDigitExponent(exponential(value, 1))
}

/** `+1.50`, `−0.25`, `+1.23e+06`: two decimals below a million; a rounded zero is `+0.00`. */
export function signed(value: number, digits = 2): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  const size = Math.abs(value) >= LARGE ? measure(Math.abs(value)) : fixed(Math.abs(value), digits)
  return `${value < 0 && Number(size) !== 0 ? MINUS : '+'}${size}`
}

/** A share of a sum: `43 %`, `−3.1 %`, `0.05 %`; the smaller it is, the more decimals it has. */
export function percent(share: number): string {
  if (!Number.isFinite(share)) return NOT_FINITE
  const size = Math.abs(100 * share)
  if (size < 0.005) return '0 %'
  const digits = size >= 9.95 ? 0 : size >= 0.095 ? 1 : 2
  return `${share < 0 ? MINUS : ''}${size >= LARGE ? measure(size) : fixed(size, digits)} %`
}

/** The place of a request that waits for the device: `waiting: 3 requests ahead, about 12 s`. */
export function waitingLine({ requestsAhead = 0, expectedSeconds = 0 }: WaitingMessage): string {
  const seconds = Math.ceil(Number(expectedSeconds))
  const about = seconds > 0 ? `, about ${seconds} s` : ''
  return `waiting: ${requestsAhead} ${requestsAhead === 1 ? 'request' : 'requests'} ahead${about}`
}

/** A fixed number of decimals: `0.93`. */
export function decimals(value: number, digits: number): string {
  return Number.isFinite(value) ? fixed(value, digits) : NOT_FINITE
}

/** An integer with thin spaces between thousands. */
export function count(value: number): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  return String(value).replace(/\B(?=(\d{3})+$)/g, '\u2009')
}

/** Three (or `digits`) significant digits: `21.7`, `1230`, `0.0526`, `6.05e-05`. */
export function measure(value: number, digits = 3): string {
  if (!Number.isFinite(value)) return NOT_FINITE
  const scientific = exponential(Math.abs(value), digits)
  const size = Number(scientific)
  const sign = value < 0 && size > 0 ? MINUS : ''
  if (size === 0 || (size >= 1e-4 && size < LARGE)) return `${sign}${size}`
  return `${sign}${twoDigitExponent(size.toExponential())}`
}

function twoDigitExponent(text: string): string {
  return text.replace(/([+-])(\d)$/, '$10$2')
}

const EXACT = 60 // further digits, enough to tell whether a float lies halfway between two texts

/** `toFixed`, except that halfway cases round to the even digit, as in Python. */
function fixed(value: number, digits: number): string {
  return roundedToEven(value.toFixed(digits), value.toFixed(digits + EXACT))
}

function exponential(value: number, digits: number): string {
  const exact = value.toExponential(digits - 1 + EXACT)
  const [mantissa = '', exponent = ''] = value.toExponential(digits - 1).split('e')
  return `${roundedToEven(mantissa, exact.split('e')[0] ?? '')}e${exponent}`
}

/** JavaScript rounds halfway cases up, so an odd last digit goes back by one. */
function roundedToEven(text: string, exact: string): string {
  const halfway = /^5?0*$/.test(exact.slice(-EXACT)) && exact.at(-EXACT) === '5'
  const last = Number(text.at(-1))
  return halfway && last % 2 === 1 ? `${text.slice(0, -1)}${last - 1}` : text
}

// The names of the kinds, as the client has them in `_presentation.py`.
export const NODE_NAMES: Record<string, string> = {
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
  MIXER_OUTPUT: 'mixer’s result',
  MIXER_HEAD: 'of the mixer',
}

/** `L2 head 3 value of ␣Japan (3)`, without the node's own position. */
export function nodeName(node: GraphNode, prompt: readonly Token[]): string {
  const text = [numbered(node), NODE_NAMES[node.kind] ?? node.kind.toLowerCase()]
  const source = node.kind === 'BLOCK_INPUT' ? node.position : node.source
  if (source !== undefined) text.push(`of ${at(source, prompt)}`)
  return text.filter(Boolean).join(' ')
}

/** `L2 head 3` or `L2 expert 1 neuron 7`, with the reader's name for it: `L2 head 3 “capitals”`. */
export function numbered({ layer, head, expert, neuron, annotation }: GraphNode): string {
  const text: string[] = []
  if (layer !== undefined) text.push(`L${layer}`)
  if (head !== undefined) text.push(`head ${head}`)
  if (expert !== undefined) text.push(`expert ${expert}`)
  if (neuron !== undefined) text.push(`neuron ${neuron}`)
  if (annotation?.name) text.push(`“${isolated(annotation.name)}”`)
  return text.join(' ')
}

const SUBLAYERS: Record<string, string> = {
  ATTENTION_OUTPUT: 'attention',
  ATTENTION_BIAS: 'attention’s bias',
  MIXER_OUTPUT: 'mixer',
  MLP_OUTPUT: 'MLP',
  MLP_BIAS: 'MLP’s bias',
}

/** `L2 head 3`, `L2 MLP` or `embedding`: the name of a part of the logit. */
export function shortName(node: GraphNode): string {
  const name = SUBLAYERS[node.kind]
  if (name) return `L${node.layer} ${name}`
  return numbered(node) || (NODE_NAMES[node.kind] ?? node.kind)
}

/**
 * `␣Japan (3)`: the token at a position, and the position. Longer texts than `length` characters have
 * a truncated token, and always the position.
 */
export function at(
  position: number,
  prompt: readonly Token[],
  length = Number.POSITIVE_INFINITY,
): string {
  const token = prompt[position]
  const number = `(${position})`
  return token
    ? `${fitted(token.label, Math.max(1, length - number.length - 1))} ${number}`
    : number
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
