import type { Token } from '../model/tokens'

// RPCs through the page's own HTTP server: protobuf JSON, one message per line.

const TOKEN = 'januslens-token'

/** Moves the access token from the URL fragment to the session storage. */
export function keepToken(): void {
  const parameters = new URLSearchParams(window.location.hash.slice(1))
  const token = parameters.get('token')
  if (token === null) return
  sessionStorage.setItem(TOKEN, token)
  parameters.delete('token')
  const rest = parameters.size > 0 ? `#${parameters}` : window.location.pathname
  window.history.replaceState(null, '', rest)
}

export interface ErrorDetails {
  message?: string
  code?: string
  reason?: string
  request_id?: string
  field_violations?: { field: string; description: string }[]
  retry_after?: number | null
}

/** A failed call with the details that the server returned. */
export class CallError extends Error {
  constructor(readonly details: ErrorDetails) {
    super(details.message ?? details.code ?? 'the call failed')
  }
}

/** Yields the lines of a response as they arrive. */
export async function* call(
  method: string,
  request: unknown,
  signal?: AbortSignal,
): AsyncGenerator<string> {
  const answer = await post(`/api/${method}`, JSON.stringify(request), signal)
  if (!answer.body) return
  let rest = ''
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
  for (;;) {
    const { value, done } = await reader.read()
    if (done) break
    const lines = (rest + value).split('\n')
    rest = lines.pop() ?? ''
    for (const line of lines) yield checked(line)
  }
}

/** Returns the message of a unary call. */
export async function callOnce<Message>(method: string, request: unknown): Promise<Message> {
  for await (const line of call(method, request)) return JSON.parse(line) as Message
  throw new CallError({ message: `the server returned no response to ${method}` })
}

/** Builds a saved page from the messages received so far. */
export async function savedPage(view: string, streams: Record<string, string[]>): Promise<Blob> {
  return (await post(`/page/${view}`, JSON.stringify(streams))).blob()
}

async function post(path: string, body: string, signal?: AbortSignal): Promise<Response> {
  const answer = await fetch(path, {
    method: 'POST',
    headers: { 'x-januslens-token': sessionStorage.getItem(TOKEN) ?? '' },
    body,
    signal: signal ?? null,
  })
  if (!answer.ok) throw new CallError(await refusal(answer))
  return answer
}

async function refusal(answer: Response): Promise<ErrorDetails> {
  const text = await answer.text()
  try {
    return (JSON.parse(text) as { error: ErrorDetails }).error
  } catch {
    return { message: text || `HTTP ${answer.status}` }
  }
}

/** Returns the line, or throws if it reports an error. */
function checked(line: string): string {
  if (line.startsWith('{"error"')) {
    throw new CallError((JSON.parse(line) as { error: ErrorDetails }).error)
  }
  return line
}

// Requests as protobuf JSON, from the text of the form. The server validates them.

/** The fields of the form. */
export interface Question {
  model: string
  prompt: string
  target: string
  /** A clicked token, which replaces the typed target. */
  clickedTarget?: Token | undefined
  layers: string
  positions: string
  heads: string
  lens: string
  matrices: string[]
  subject: string
  neurons: string
  spectrum: string
  rate: string
}

type Json = Record<string, unknown>

export function traceRequest(question: Question): Json {
  const positions = question.positions.trim()
  return {
    ...common(question),
    ...(question.target === '' && !question.clickedTarget ? {} : { target: target(question) }),
    ...(positions === 'all' ? { allPositions: true } : { positions: numbers(positions) }),
    ...(question.heads.trim() === '' ? {} : { selection: { heads: Number(question.heads) } }),
    includeLogitContribution: true,
  }
}

export function gradientRequest(question: Question): Json {
  return {
    ...common(question),
    nll: { target: target(question) },
    matrices: question.matrices.map((kind) => `MATRIX_KIND_${kind}`),
    neurons: Number(question.neurons || 0),
    spectrumRank: Number(question.spectrum || 0),
    ...(question.rate.trim() === '' ? {} : { learningRate: Number(question.rate) }),
    ...(question.subject === '' ? {} : { subject: { text: question.subject } }),
  }
}

export interface EditQuestion {
  kind: 'shift' | 'descent'
  strength: number
  layer: number
}

export function previewRequest(
  question: Question,
  edit: EditQuestion,
  probes: readonly string[],
): Json {
  const { strength, layer } = edit
  return {
    model: question.model,
    input: { prompt: question.prompt },
    target: target(question),
    ...(edit.kind === 'shift'
      ? { shift: { layer, eta: strength } }
      : { descent: { learningRate: strength } }),
    probes: probes.map((prompt) => ({ label: prompt, input: { prompt } })),
  }
}

export function editTitle({ kind, strength, layer }: EditQuestion): string {
  return kind === 'shift'
    ? `Effect of a forward shift of layer ${layer} by ${strength}`
    : `Effect of a descent step with learning rate ${strength}`
}

function target({ target, clickedTarget }: Question): Json {
  return clickedTarget ? { tokenIds: { ids: [clickedTarget.id] } } : { text: target }
}

function common(question: Question): Json {
  return {
    model: question.model,
    input: { prompt: question.prompt },
    layers: numbers(question.layers),
    lens: `LENS_${question.lens}`,
  }
}

/** Parses `0-3,7` as [0, 1, 2, 3, 7] and `-1,3` as [-1, 3]. */
export function numbers(text: string): number[] {
  return text
    .split(',')
    .map((piece) => piece.trim())
    .filter((piece) => piece !== '')
    .flatMap((piece) => {
      const range = piece.match(/^(\d+)-(\d+)$/)
      if (!range) return [Number(piece)]
      const [first, last] = [Number(range[1]), Number(range[2])]
      return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => first + i)
    })
}
