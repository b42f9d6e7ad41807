import type { TraceResponse } from '../contract/messages'
import { messages, pageDescription } from '../page/blocks'
import { shell } from '../page/shell'
import { TraceView } from './view'

/** Shows the trace that the page holds, by replaying its streams. */
export async function tracePage(): Promise<void> {
  const { title } = pageDescription()
  const view = new TraceView(shell(), title)
  for (const stream of ['trace', 'overview']) {
    for await (const message of messages<TraceResponse>(stream)) view.feed(message)
  }
  view.draw()
}
