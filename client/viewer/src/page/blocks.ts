// A page holds its streams as blocks: one message a block, canonical protobuf JSON, deflated and in
// base64. A page is thus a recorded stream; the live page is fed the same messages as they come.
import { fromBase64 } from '../label/tokens'

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
