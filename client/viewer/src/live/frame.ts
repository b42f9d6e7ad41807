// One answer's page in a frame of its own: the same program as a page from a file.
import type { Posted, Reported } from '../page/feed'
import { element } from '../parts/dom'

export class Frame {
  readonly element: HTMLIFrameElement
  private waiting: Posted[] | undefined = []

  constructor(
    view: 'trace' | 'gradient',
    title: string,
    private readonly heard: (news: Reported) => void,
  ) {
    this.element = element('iframe', { src: `/frame/${view}`, title })
    window.addEventListener('message', (event: MessageEvent<Reported>) => this.receive(event))
  }

  /** Posts a message as soon as the frame listens. */
  post(posted: Posted): void {
    if (this.waiting) this.waiting.push(posted)
    else this.element.contentWindow?.postMessage(posted, window.location.origin)
  }

  private receive(event: MessageEvent<Reported>): void {
    if (event.source !== this.element.contentWindow) return
    if (event.origin !== window.location.origin) return
    if (event.data.ready) this.flush()
    else this.heard(event.data)
  }

  private flush(): void {
    const waiting = this.waiting ?? []
    this.waiting = undefined
    for (const posted of waiting) this.post(posted)
  }
}
