import type { TraceResponse } from '../contract/messages'
import { messages, pageDescription } from '../page/blocks'
import { shell } from '../page/shell'
import { TraceView } from './view'

/** Shows the trace that the page holds, by replaying its streams. */
export async function tracePage(): Promise<void> {
  const { title } = pageDescription()
  const view = new TraceView(shell(), title)
  const detail = messages<TraceResponse>('trace')
  const header = await detail.next() // first, since it says which positions were traced in full
  if (!header.done) view.feed(header.value)
  for (const stream of [messages<TraceResponse>('overview'), detail]) {
    for await (const message of stream) {
      view.feed(message)
      view.drawSoon()
    }
  }
  view.draw()
  document.documentElement.dataset.ready = 'complete'
}
