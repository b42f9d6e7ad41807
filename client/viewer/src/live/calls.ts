import type { WaitingMessage } from '../contract'

// RPCs through the page's own HTTP server: protobuf JSON, one message per line.

const TOKEN = 'januslens-token'
const NO_RESPONSE =
  'januslens ui does not respond; if it has ended, start it again and open its new address'

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

/**
 * Yields the lines of a response as they arrive, without those about a request that waits for the
 * device, which are passed to `onWaiting`.
 */
export async function* call(
  method: string,
  request: unknown,
  signal?: AbortSignal,
  onWaiting: (waiting: WaitingMessage) => void = () => {},
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
    for (const line of lines) {
      const waiting = waitingIn(line)
      if (waiting) onWaiting(waiting)
      else yield checked(line)
    }
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
  }).catch((error: unknown) => {
    if (!(error instanceof TypeError)) throw error
    throw new CallError({ message: NO_RESPONSE, code: 'UNAVAILABLE' })
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

function waitingIn(line: string): WaitingMessage | undefined {
  if (!line.startsWith('{"waiting"')) return undefined
  return (JSON.parse(line) as { waiting: WaitingMessage }).waiting
}

/** Returns the line, or throws if it reports an error. */
function checked(line: string): string {
  if (line.startsWith('{"error"')) {
    throw new CallError((JSON.parse(line) as { error: ErrorDetails }).error)
  }
  return line
}
