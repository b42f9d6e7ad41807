import { fromBase64, type Token } from '../model/tokens'
import type { Theme } from './shell'

// A page holds its streams as blocks: one message a block, canonical protobuf JSON, deflated and in
// base64. A page is thus a recorded stream; the live page is fed the same messages as they come.

/** What the page is, as the element `januslens-page` says. */
export interface PageDescription {
  view: 'trace' | 'gradient' | 'live'
  /** Whether the streams come from the live page around this one, instead of standing in it. */
  live?: boolean
  title: string
  version: string
}

export function pageDescription(): PageDescription {
  const element = document.getElementById('januslens-page')
  if (!element?.textContent) throw new Error('expected an element januslens-page; the file is cut')
  return JSON.parse(element.textContent) as PageDescription
}

export function isLive(): boolean {
  return pageDescription().live === true
}

/** The recorded messages of a stream in order, each inflated when its turn comes. */
export async function* recorded<Message>(stream: string): AsyncGenerator<Message> {
  for (const line of blocks(stream)) yield JSON.parse(await inflate(line)) as Message
}

export function has(stream: string): boolean {
  return document.querySelector(selector(stream)) !== null
}

/** The names of the streams that the page holds, each once. */
export function streamNames(): string[] {
  const blocks = document.querySelectorAll<HTMLElement>('script[data-stream]')
  return [...new Set(Array.from(blocks, (block) => block.dataset.stream ?? ''))]
}

function* blocks(stream: string): Generator<string> {
  for (const element of document.querySelectorAll(selector(stream))) {
    yield element.textContent ?? ''
  }
}

/** All lines of a stream as they were recorded: what the command's `--json` prints. */
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

// A page within the live page: the one around it posts the streams' messages as they come.

/** What the live page posts into a frame. */
export interface FrameInput {
  stream?: string
  message?: unknown
  /** No more messages will come of the stream. */
  end?: boolean
  /** Select what stands at this layer and position. */
  select?: Coordinates
  /** Show yourself in this theme. */
  theme?: Theme
}

/** What a frame posts to the page around it. */
export interface FrameOutput {
  ready?: boolean
  at?: Coordinates
  /** A person wants this token as the target. */
  target?: Token
}

/** Equal in every request on the same prompt, of a trace as of a gradient. */
export interface Coordinates {
  layer: number
  position: number
}

/** The messages of one stream in the order they were posted, until its end. */
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

const queuees = new Map<string, MessageQueue>()
let handlers: FrameHandlers | undefined

function queue(stream: string): MessageQueue {
  const found = queuees.get(stream) ?? new MessageQueue()
  queuees.set(stream, found)
  return found
}

export function posted<Message>(stream: string): AsyncGenerator<Message> {
  return queue(stream).take() as AsyncGenerator<Message>
}

/** What the page around a frame may ask of it beside taking messages. */
export interface FrameHandlers {
  /** Another frame has selected a layer and position. */
  select: (place: Coordinates) => void
  theme: (theme: Theme) => void
}

/** Begins to listen. */
export function connectToLivePage(given: FrameHandlers): void {
  if (!isLive()) return
  handlers = given
  document.documentElement.dataset.live = '' // what the page around has is not shown again
  window.addEventListener('message', receive)
  reportToParent({ ready: true })
}

/** Tells the page around this one. */
export function reportToParent(news: FrameOutput): void {
  if (isLive()) window.parent.postMessage(news, window.location.origin)
}

function receive(event: MessageEvent<FrameInput>): void {
  if (event.source !== window.parent || event.origin !== window.location.origin) return
  const { data } = event
  if (data.stream !== undefined) queue(data.stream).put(data)
  if (data.select) handlers?.select(data.select)
  if (data.theme !== undefined) handlers?.theme(data.theme)
}

/** The messages of a stream in order: those that the page holds, or those that come. */
export function messages<Message>(stream: string): AsyncGenerator<Message> {
  return isLive() ? posted(stream) : recorded(stream)
}
