import type { KnockOutChoice, Removed } from '../browser/streams'
import { everywhere, interventionOf, partName } from '../model/knock_out'
import type { Token } from '../model/tokens'
import { visible } from '../model/tokens'

// A question, and the requests that it becomes: protobuf JSON. The server validates them.

/**
 * The fields of a question. All are texts, as in the form, so that a question can be a part of the
 * page's address. An empty field means the default.
 */
export const QUESTION = {
  /** The kind of result: see `View`. */
  ask: '',
  model: '',
  prompt: '',
  /** A conversation instead of the prompt, as JSON: `[["user", "Hello"]]`. */
  chat: '',
  /** Token ids instead of the prompt, which is then only shown: `17,4`. */
  ids: '',
  target: '',
  /** Id of the target, instead of its text. */
  targetId: '',
  /** A part of the pass that is set to zero: see `interventionOf`. */
  without: '',
  /** What a sweep removes: see `SWEEPS`. */
  sweep: '',
  layers: '',
  positions: '',
  heads: '',
  lens: '',
  matrices: '',
  subject: '',
  neurons: '',
  spectrum: '',
  rate: '',
  tokens: '',
  temperature: '',
  seed: '',
  stop: '',
} as const

export type Question = Record<keyof typeof QUESTION, string>

/** A kind of result. */
export type View = 'trace' | 'gradient' | 'generation' | 'effects'

/** The name of each view, and the RPC that computes it. */
export const VIEWS: Record<View, { name: string; method: string; request: typeof traceRequest }> = {
  trace: { name: 'Trace', method: 'Trace', request: traceRequest },
  gradient: { name: 'Gradient', method: 'GradientLens', request: gradientRequest },
  generation: { name: 'Generation', method: 'Generate', request: generateRequest },
  effects: { name: 'Effects', method: 'Intervene', request: effectsRequest },
}

export function viewOf(question: Question): View | undefined {
  return question.ask in VIEWS ? (question.ask as View) : undefined
}

type Json = Record<string, unknown>

/** Input that cannot be sent, with the reason in words. */
export class InvalidQuestion extends Error {}

/** One message of a conversation. */
export interface Message {
  role: string
  content: string
}

export function messagesOf({ chat }: Question): Message[] {
  if (chat === '') return []
  try {
    const pairs = JSON.parse(chat) as [string, string][]
    return pairs.map(([role, content]) => ({ role: String(role), content: String(content) }))
  } catch {
    throw new InvalidQuestion('invalid conversation; expected pairs of role and content as JSON')
  }
}

export function chatOf(messages: readonly Message[]): string {
  return JSON.stringify(messages.map(({ role, content }) => [role, content]))
}

const LONGEST = 80 // characters of a prompt in a title

/** The end of the prompt, or of the conversation's last message, in one line. */
export function promptOf(question: Question): string {
  const last = question.ids === '' ? messagesOf(question).at(-1) : undefined
  const text = (last?.content ?? question.prompt).replace(/\s+/g, ' ').trim()
  return text.length > LONGEST ? `… ${text.slice(1 - LONGEST)}` : text
}

/** The heading of a result. */
export function titleOf(question: Question): string {
  const view = viewOf(question)
  const swept = SWEEPS[question.sweep]?.name ?? ''
  const name = view === 'effects' ? `Effect of ${swept}` : view ? VIEWS[view].name : ''
  const target = question.targetId ? question.target : visible(question.target)
  const arrow = target && view !== 'generation' ? ` → ${target}` : ''
  const without = question.without ? `, without ${partName(question.without)}` : ''
  const on = view === 'effects' ? 'on' : 'of'
  const model = question.model && ` (${question.model})`
  return `${name} ${on} “${promptOf(question)}”${arrow}${without}${model}`
}

/** The question whose target is a token that the user clicked. */
export function withTarget(question: Question, target: Token): Question {
  return { ...question, target: target.label, targetId: String(target.id) }
}

/** Whether two questions have the same tokens on the same model. */
export function sameInput(a: Question, b: Question): boolean {
  return (['model', 'prompt', 'chat', 'ids'] as const).every((field) => a[field] === b[field])
}

function traceRequest(question: Question): Json {
  const heads = question.heads.trim()
  return {
    ...common(question),
    ...targetOf(question),
    ...(question.positions.trim() === 'all'
      ? { allPositions: true }
      : { positions: integers('Positions', question.positions) }),
    selection: {
      by: 'SELECTION_CRITERION_CONTRIBUTION',
      ...(heads === '' ? {} : { heads: natural('Heads', heads) }),
    },
    ...(question.without === '' ? {} : { interventions: [interventionOf(question.without)] }),
    includeLogitContribution: true,
    // Attributions are those of the last position only.
    ...(question.positions.trim() === '' ? { includeAttribution: true } : {}),
  }
}

function gradientRequest(question: Question): Json {
  const { target } = targetOf(question)
  if (!target) throw new InvalidQuestion('no target: enter the text that the model should learn')
  return {
    ...common(question),
    nll: { target },
    matrices: (question.matrices || 'FF1,FF2').split(',').map((kind) => `MATRIX_KIND_${kind}`),
    neurons: natural('Neurons', question.neurons || '0'),
    spectrumRank: natural('Singular values', question.spectrum || '0'),
    ...(question.rate.trim() === '' ? {} : { learningRate: real('Learning rate', question.rate) }),
    ...(question.subject === '' ? {} : { subject: { text: question.subject } }),
  }
}

function generateRequest(question: Question): Json {
  const { tokens, temperature, seed, stop, layers } = question
  return {
    model: question.model,
    input: inputOf(question),
    ...(tokens.trim() === '' ? {} : { maxNewTokens: natural('Tokens', tokens) }),
    sampling: {
      temperature: real('Temperature', temperature || '0'),
      seed: String(natural('Seed', seed || '0')),
    },
    ...(stop === '' ? {} : { stop: [stop] }),
    reading: { layers: integers('Layers', layers), topK: 3 },
  }
}

/** Sweeps over all parts of one kind: the parts, the axes, and the node that removes the same. */
export const SWEEPS: Record<string, { name: string; site: string; axes: Json; node: string }> = {
  '': {
    name: 'each head',
    site: 'SITE_HEAD_RESULT',
    axes: { byLayer: true, byHead: true },
    node: 'HEAD_OUTPUT',
  },
  attention: {
    name: 'attention by layer and position',
    site: 'SITE_ATTENTION_OUTPUT',
    axes: { byLayer: true, byPosition: true },
    node: 'ATTENTION_OUTPUT',
  },
  mlp: {
    name: 'MLP by layer and position',
    site: 'SITE_MLP_OUTPUT',
    axes: { byLayer: true, byPosition: true },
    node: 'MLP_OUTPUT',
  },
}

/** Measures the prediction without each part of a kind. */
function effectsRequest(question: Question): Json {
  const sweep = SWEEPS[question.sweep]
  if (!sweep) throw new InvalidQuestion(`unknown sweep “${question.sweep}”`)
  const layers = integers('Layers', question.layers)
  return {
    model: question.model,
    input: inputOf(question),
    ...targetOf(question),
    sweep: { template: { site: sweep.site, layers, zero: true }, ...sweep.axes },
  }
}

/** The part that an experiment of a sweep removed, as in `interventionOf`. */
export function removedPart(question: Question, { layer, head, position }: Removed): string {
  const at = position === undefined ? '' : `/p${position}`
  const unit = head === undefined ? '' : `/h${head}`
  return `L${layer}${at}/${SWEEPS[question.sweep]?.node}${unit}`
}

/** Measures the prediction without a part, at its own position and at every position. */
export function knockOutRequest(
  question: Question,
  { id, position, targetId }: KnockOutChoice,
): Json {
  if (question.without !== '') {
    throw new InvalidQuestion('this trace is itself without a part; knock out in the plain trace')
  }
  const all = interventionOf(everywhere(id))
  const attention = id.includes('/MEMORY_VALUE/') // its source is at one position
  return {
    model: question.model,
    input: inputOf(question),
    target: { tokenIds: { ids: [targetId] } },
    positions: [position],
    topK: 1,
    experiments: [
      { label: 'here', interventions: [interventionOf(id)] },
      ...(attention ? [] : [{ label: 'everywhere', interventions: [all] }]),
    ],
  }
}

/** The generation without a part, beside the plain one. */
export function changedGeneration(question: Question): { title: string; request: Json } {
  const { without } = question
  const request = { ...generateRequest(question), interventions: [interventionOf(without)] }
  return { title: `Without ${partName(without)}`, request }
}

export interface EditQuestion {
  kind: 'shift' | 'descent'
  strength: string
  layer: number
}

export function previewRequest(
  question: Question,
  edit: EditQuestion,
  probes: readonly string[],
): Json {
  const strength = real('Strength', edit.strength)
  return {
    model: question.model,
    input: inputOf(question),
    ...targetOf(question),
    ...(edit.kind === 'shift'
      ? { shift: { layer: edit.layer, eta: strength } }
      : { descent: { learningRate: strength } }),
    probes: probes.map((prompt) => ({ label: prompt, input: { prompt } })),
  }
}

export function editTitle({ kind, strength, layer }: EditQuestion): string {
  return kind === 'shift'
    ? `Effect of a forward shift of layer ${layer} by ${strength}`
    : `Effect of a descent step with learning rate ${strength}`
}

export function targetOf({ target, targetId }: Question): { target?: Json } {
  if (targetId !== '') return { target: { tokenIds: { ids: [Number(targetId)] } } }
  return target === '' ? {} : { target: { text: target } }
}

export function inputOf(question: Question): Json {
  if (question.ids !== '') return { tokenIds: { ids: integers('Token ids', question.ids) } }
  const messages = messagesOf(question)
  if (messages.length === 0) return { prompt: question.prompt }
  const last = messages.at(-1)
  return { chat: { messages, continueFinalMessage: last?.role === 'assistant' } }
}

function common(question: Question): Json {
  return {
    model: question.model,
    input: inputOf(question),
    layers: integers('Layers', question.layers),
    lens: `LENS_${question.lens || 'FINAL_NORM'}`,
  }
}

/** Parses `0-3,7` as [0, 1, 2, 3, 7] and `-1,3` as [-1, 3]. */
export function integers(name: string, text: string): number[] {
  return text
    .split(',')
    .map((piece) => piece.trim())
    .filter((piece) => piece !== '')
    .flatMap((piece) => {
      const [, from, to] = piece.match(/^(\d{1,6})-(\d{1,6})$/) ?? []
      const [first, last] = [Number(from), Number(to)]
      if (last >= first) return Array.from({ length: last - first + 1 }, (_, i) => first + i)
      if (/^-?\d{1,9}$/.test(piece)) return [Number(piece)]
      throw new InvalidQuestion(
        `invalid ${name.toLowerCase()} “${piece}”; expected numbers and ranges, for example 0-3,7`,
      )
    })
}

function natural(name: string, text: string): number {
  if (/^\d{1,9}$/.test(text.trim())) return Number(text)
  throw new InvalidQuestion(`invalid ${name.toLowerCase()} “${text}”; expected a number from 0`)
}

function real(name: string, text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && Number.isFinite(value)) return value
  throw new InvalidQuestion(`invalid ${name.toLowerCase()} “${text}”; expected a number`)
}
