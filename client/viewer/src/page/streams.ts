import { isLive, recorded } from './blocks'
import { posted } from './feed'

/** The messages of a stream in order: those that the page holds, or those that come. */
export function messages<Message>(stream: string): AsyncGenerator<Message> {
  return isLive() ? posted(stream) : recorded(stream)
}
