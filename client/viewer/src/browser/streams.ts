import { fromBase64, type Token } from '../model/tokens'
import type { Theme } from './shell'

// Where a view gets its messages. A saved page embeds its streams, one message per script element:
// canonical protobuf JSON, deflated, base64. A frame of the live page receives the same messages
// from its parent as they arrive.

/** The contents of the page's `januslens-page` element. */
export interface PageDescription {
  view: 'trace' | 'comparison' | 'gradient' | 'generation' | 'effects' | 'live'
  /** Whether the parent page posts the streams; otherwise they are embedded. */
  live?: boolean
  title: string
  version: string
  /** Names and notes of heads and neurons that the page was saved with; see `annotationsOf`. */
  names?: string
  /** Of a comparison: the position in the second prompt by the one in the first, if they differ. */
  positions?: Record<string, number>
}

export function pageDescription(): PageDescription {
  const element = document.getElementById('januslens-page')
  if (!element?.textContent)
    throw new Error('element januslens-page is missing: the file is incomplete')
  return JSON.parse(element.textContent) as PageDescription
}

export function isLive(): boolean {
  return pageDescription().live === true
}

/** The embedded messages of a stream in order, inflated one at a time. */
export async function* recorded<Message>(stream: string): AsyncGenerator<Message> {
  for (const line of blocks(stream)) yield JSON.parse(await inflate(line)) as Message
}

export function has(stream: string): boolean {
  return document.querySelector(selector(stream)) !== null
}

/** The distinct names of the embedded streams. */
export function streamNames(): string[] {
  const blocks = document.querySelectorAll<HTMLElement>('script[data-stream]')
  return [...new Set(Array.from(blocks, (block) => block.dataset.stream ?? ''))]
}

function* blocks(stream: string): Generator<string> {
  for (const element of document.querySelectorAll(selector(stream))) {
    yield element.textContent ?? ''
  }
}

/** All lines of an embedded stream, as the CLI prints them with `--json`. */
export async function lines(stream: string): Promise<string[]> {
  return Promise.all(Array.from(blocks(stream), inflate))
}

function selector(stream: string): string {
  return `script[data-stream="${CSS.escape(stream)}"]`
}

async function inflate(block: string): Promise<string> {
  const inflated = new Blob([fromBase64(block)])
    .stream()
    .pipeThrough(new DecompressionStream('deflate'))
  return new Response(inflated).text()
}

// A frame of the live page: its parent posts the messages of the streams.

/** What the live page posts to a frame. */
export interface FrameInput {
  stream?: string
  message?: unknown
  /** The stream has ended. */
  end?: boolean
  /** Select this layer and position. */
  select?: Coordinates
  /** Use this theme. */
  theme?: Theme
  /** Use these names and notes. */
  names?: string
}

/** What a frame posts to the live page. */
export interface FrameOutput {
  ready?: boolean
  at?: Coordinates
  /** The user chose this token as the target. */
  target?: Token
  /** The user selected a generated token. */
  generated?: GeneratedChoice
  /** The user asks what the prediction at a position is without a part. */
  knockOut?: KnockOutChoice
  /** The user asks for a trace without the part that an experiment of a sweep removed. */
  removed?: Removed
  /** The user asks for a generation without the part of this node. */
  regenerate?: string
  /** The user changed the names and notes of heads and neurons. */
  names?: string
}

/** The coordinates of an experiment; those that the sweep does not have are undefined. */
export interface Removed {
  view: 'trace' | 'generation'
  layer: number | undefined
  head: number | undefined
  position: number | undefined
}

/** A part of the pass by the id of its node, and the prediction to measure. */
export interface KnockOutChoice {
  id: string
  position: number
  targetId: number
}

/** A generated token, and the ids and the text before it. */
export interface GeneratedChoice {
  ids: number[]
  text: string
  token: Token
  /** Whether it was generated under the interventions of the question. */
  changed: boolean
}

/** Coordinates shared by traces and gradients of the same prompt. */
export interface Coordinates {
  layer: number
  position: number
}

/** The posted messages of one stream, in order. */
class MessageQueue {
  private readonly waiting: unknown[] = []
  private ended = false
  private wake: () => void = () => {}

  put(posted: FrameInput): void {
    if (posted.end) this.ended = true
    else this.waiting.push(posted.message)
    this.wake()
  }

  async *take(): AsyncGenerator<unknown> {
    for (;;) {
      while (this.waiting.length > 0) yield this.waiting.shift()
      if (this.ended) return
      await new Promise<void>((resolve) => {
        this.wake = resolve
      })
    }
  }
}

const queues = new Map<string, MessageQueue>()
let handlers: FrameHandlers | undefined

function queue(stream: string): MessageQueue {
  const found = queues.get(stream) ?? new MessageQueue()
  queues.set(stream, found)
  return found
}

export function posted<Message>(stream: string): AsyncGenerator<Message> {
  return queue(stream).take() as AsyncGenerator<Message>
}

/** How a frame reacts to the live page. */
export interface FrameHandlers {
  /** Another frame selected this layer and position. */
  select: (place: Coordinates) => void
  theme: (theme: Theme) => void
  /** The user changed names and notes in another frame of the same model. */
  names?: (names: string) => void
}

/** Listens to the live page, if there is one. */
export function connectToLivePage(given: FrameHandlers): void {
  if (!isLive()) return
  handlers = given
  document.documentElement.dataset.live = '' // hides what the live page already shows
  window.addEventListener('message', receive)
  reportToParent({ ready: true })
}

/** Posts to the live page, if there is one. */
export function reportToParent(news: FrameOutput): void {
  if (isLive()) window.parent.postMessage(news, window.location.origin)
}

function receive(event: MessageEvent<FrameInput>): void {
  if (event.source !== window.parent || event.origin !== window.location.origin) return
  const { data } = event
  if (data.stream !== undefined) queue(data.stream).put(data)
  if (data.select) handlers?.select(data.select)
  if (data.theme !== undefined) handlers?.theme(data.theme)
  if (data.names !== undefined) handlers?.names?.(data.names)
}

/** The messages of a stream in order, embedded or posted. */
export function messages<Message>(stream: string): AsyncGenerator<Message> {
  return isLive() ? posted(stream) : recorded(stream)
}
