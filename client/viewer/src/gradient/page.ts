import type { GradientResponse, PreviewEditResponse } from '../contract/gradient'
import { messages, pageDescription, streamNames } from '../page/blocks'
import { shell } from '../page/shell'
import { GradientView } from './view'

const PREVIEW = 'preview:'

/** Shows the gradient that the page holds, by replaying its streams. */
export async function gradientPage(): Promise<void> {
  const view = new GradientView(shell(), pageDescription().title)
  for await (const message of messages<GradientResponse>('gradient')) view.feed(message)
  view.draw()
  for (const name of streamNames().filter((stream) => stream.startsWith(PREVIEW))) {
    for await (const message of messages<PreviewEditResponse>(name)) {
      view.preview(name.slice(PREVIEW.length), message)
    }
  }
}
