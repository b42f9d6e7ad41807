import { element } from '../presentation/elements'

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

// The view's state lives in the URL's fragment: a link to the page is a link to the view.

export type Changes<Key extends string> = Partial<Record<Key, string>>
type Listener<Key extends string> = (changed: ReadonlySet<Key>) => void

/** Named strings with defaults; only what differs from its default stands in the URL. */
export class HashState<Key extends string> {
  private values: Record<Key, string>
  private readonly listeners: Listener<Key>[] = []

  constructor(private readonly defaults: Readonly<Record<Key, string>>) {
    this.values = this.read()
    window.addEventListener('hashchange', () => this.become(this.read()))
  }

  get(key: Key): string {
    return this.values[key]
  }

  /** A comma-separated list; ids and numbers have no commas. */
  list(key: Key): string[] {
    const value = this.values[key]
    return value === '' ? [] : value.split(',')
  }

  set(changes: Changes<Key>): void {
    const next = { ...this.values, ...changes }
    this.become(next)
    write(this.fragment())
  }

  /** Called after every change with the names of what changed. */
  subscribe(listener: Listener<Key>): void {
    this.listeners.push(listener)
  }

  fragment(): string {
    const parameters = new URLSearchParams()
    for (const key of this.keys()) {
      if (this.values[key] !== this.defaults[key]) parameters.set(key, this.values[key])
    }
    return parameters.toString()
  }

  private keys(): Key[] {
    return Object.keys(this.defaults) as Key[]
  }

  private read(): Record<Key, string> {
    const parameters = new URLSearchParams(window.location.hash.slice(1))
    const values = { ...this.defaults } as Record<Key, string>
    for (const key of this.keys()) values[key] = parameters.get(key) ?? this.defaults[key]
    return values
  }

  private become(next: Record<Key, string>): void {
    const changed = new Set(this.keys().filter((key) => next[key] !== this.values[key]))
    this.values = next
    if (changed.size > 0) for (const listener of this.listeners) listener(changed)
  }
}

function write(fragment: string): void {
  try {
    window.history.replaceState(null, '', `#${fragment}`)
  } catch {
    // A page inside a page (a notebook's output) has no address of its own.
  }
}

export type Theme = '' | 'light' | 'dark'

/** Light, dark, or ('') as the system has it; the colours themselves are in styles/theme.css. */
export function setTheme(theme: Theme): void {
  const { dataset } = document.documentElement
  if (dataset.theme !== theme) dataset.theme = theme // even the same again is styled again
}

export function isDark(): boolean {
  const chosen = document.documentElement.dataset.theme
  return chosen ? chosen === 'dark' : window.matchMedia('(prefers-color-scheme: dark)').matches
}

const resolved = new Map<string, string>()

/** A colour of the theme as the browser resolves it, for canvas and exported pictures. */
export function resolvedColour(variable: string): string {
  const key = `${variable} ${isDark() ? 'dark' : 'light'}`
  const known = resolved.get(key)
  if (known) return known
  const probe = document.createElement('span')
  probe.style.color = `var(${variable})`
  document.body.append(probe)
  const { color } = getComputedStyle(probe)
  probe.remove()
  resolved.set(key, color)
  return color
}

/** Draws once before the next frame, however often it is asked to until then. */
export function oncePerFrame(draw: () => void): () => void {
  let question = false
  return () => {
    if (question) return
    question = true
    requestAnimationFrame(() => {
      question = false
      draw()
    })
  }
}

/** Remembers what was drawn last, so that the same is not drawn again. */
export class ChangeTracker {
  private last: string | undefined

  /** Whether these differ from those of the call before. */
  changed(...parts: readonly (string | number | boolean)[]): boolean {
    const key = parts.join(' ')
    const changed = key !== this.last
    this.last = key
    return changed
  }
}
