import type { TraceResponse } from '../contract/messages'
import { isLive, pageDescription } from '../page/blocks'
import { joinLivePage, report } from '../page/feed'
import { shell } from '../page/shell'
import { soon } from '../page/soon'
import { messages } from '../page/streams'
import { TraceView } from './view'

/** Shows the trace that the page holds, or that comes while one watches. */
export async function tracePage(): Promise<void> {
  const view = new TraceView(shell(), pageDescription().title)
  joinLivePage({
    go: ({ layer, position }) => view.select(`L${layer}/p${position}/BLOCK_OUTPUT`),
    theme: (theme) => view.state.set({ theme }),
  })
  view.state.subscribe(() => {
    const node = view.graph.node(view.state.get('sel'))
    if (node?.layer !== undefined) report({ at: { layer: node.layer, position: node.position } })
  })
  const detail = messages<TraceResponse>('trace')
  const header = await detail.next() // first, since it says which positions were traced in full
  if (!header.done) view.feed(header.value)
  const replays = [messages<TraceResponse>('overview'), detail]
  // Live, both come at once; from a file the overview is drawn before the rest is inflated.
  if (isLive()) await Promise.all(replays.map((stream) => replay(view, stream)))
  else for (const stream of replays) await replay(view, stream)
  view.draw()
  document.documentElement.dataset.ready = 'complete'
}

async function replay(view: TraceView, stream: AsyncGenerator<TraceResponse>): Promise<void> {
  const draw = soon(() => view.draw())
  for await (const message of stream) {
    view.feed(message)
    if (isLive()) draw()
    else view.drawSoon()
  }
}
