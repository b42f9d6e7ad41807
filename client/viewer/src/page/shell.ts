import { element } from '../parts/dom'

/** The places of a page; both views fill the same ones. */
export interface Shell {
  header: HTMLElement
  toolbar: HTMLElement
  main: HTMLElement
  aside: HTMLElement
  /** Said aloud by screen readers when it changes. */
  live: HTMLElement
}

export function shell(): Shell {
  const parts = {
    header: element('header', { class: 'page-header' }),
    toolbar: element('div', { class: 'toolbar', role: 'toolbar', 'aria-label': 'View' }),
    main: element('main', { class: 'stage' }),
    aside: element('aside', { class: 'inspector', 'aria-label': 'Inspector' }),
    live: element('div', { class: 'visually-hidden', 'aria-live': 'polite' }),
  }
  parts.header.append(parts.toolbar)
  const columns = element('div', { class: 'columns' }, parts.main, parts.aside)
  document.body.append(parts.header, columns, parts.live)
  return parts
}
