import type { GradientResponse, PreviewEditResponse } from '../contract/gradient'
import { isLive, pageDescription, streamNames } from '../page/blocks'
import { joinLivePage, report } from '../page/feed'
import { shell } from '../page/shell'
import { soon } from '../page/soon'
import { messages } from '../page/streams'
import { placeOf } from './state'
import { GradientView } from './view'

const PREVIEW = 'preview:'

/** Shows the gradient that the page holds, or that comes while one watches. */
export async function gradientPage(): Promise<void> {
  const view = new GradientView(shell(), pageDescription().title)
  joinLivePage({
    go: (place) => view.go(place),
    theme: (theme) => view.state.set({ theme }),
  })
  view.state.subscribe(() => {
    const place = placeOf(view.state.get('sel'))
    if (place) report({ at: { layer: place.layer, position: place.position } })
  })
  const draw = soon(() => view.draw())
  for await (const message of messages<GradientResponse>('gradient')) {
    view.feed(message)
    if (isLive()) draw()
  }
  view.draw()
  document.documentElement.dataset.ready = 'complete'
  await showPreviews(view)
}

async function showPreviews(view: GradientView): Promise<void> {
  interface Titled {
    title: string
    response: PreviewEditResponse
  }
  if (isLive()) {
    for await (const found of messages<Titled>('previews'))
      view.preview(found.title, found.response)
    return
  }
  for (const name of streamNames().filter((stream) => stream.startsWith(PREVIEW))) {
    for await (const message of messages<PreviewEditResponse>(name)) {
      view.preview(name.slice(PREVIEW.length), message)
    }
  }
}
