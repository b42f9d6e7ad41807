import { element } from '../presentation/elements'

/** The regions of a page, which each view fills. */
export interface Shell {
  header: HTMLElement
  toolbar: HTMLElement
  main: HTMLElement
  aside: HTMLElement
  /** Screen readers announce changes of this text. */
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

// The state of the view is in the URL fragment, so that a link reproduces the view.

export type Changes<Key extends string> = Partial<Record<Key, string>>
type Listener<Key extends string> = (changed: ReadonlySet<Key>) => void

/** Named strings with defaults; the URL holds only values that differ from their default. */
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

  /** Calls the listener after every change with the names of the changed values. */
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
    // A page embedded in a notebook's output may not change its address.
  }
}

/** Keeps the facts of a selection in sight in a narrow window, and the focused part beside them. */
export function showSelection(facts: HTMLElement, selection: string): void {
  facts.classList.toggle('has-selection', selection !== '')
  if (facts.dataset.selection === selection) return
  facts.dataset.selection = selection
  const focused = document.hasFocus() && document.activeElement
  if (focused instanceof SVGElement) focused.scrollIntoView({ block: 'nearest', inline: 'nearest' })
}

/** Scrolls to the first selected chip of a region if it is not visible. */
export function revealSelected(region: Element): void {
  region.querySelector('.chip.selected')?.scrollIntoView({ block: 'nearest', inline: 'nearest' })
}

export type Theme = '' | 'light' | 'dark'

/** Sets the theme; '' follows the system. The colours are in styles/theme.css. */
export function setTheme(theme: Theme): void {
  const { dataset } = document.documentElement
  if (dataset.theme !== theme) dataset.theme = theme // setting an equal value would restyle the page
}

export function isDark(): boolean {
  const chosen = document.documentElement.dataset.theme
  return chosen ? chosen === 'dark' : window.matchMedia('(prefers-color-scheme: dark)').matches
}

const resolved = new Map<string, string>()

/** A CSS variable's colour in the current theme, for canvas and exported pictures. */
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

/** Wraps `draw` so that several calls before the next frame draw once. */
export function oncePerFrame(draw: () => void): () => void {
  let scheduled = false
  return () => {
    if (scheduled) return
    scheduled = true
    requestAnimationFrame(() => {
      scheduled = false
      draw()
    })
  }
}

/** Remembers the last drawn state, so that equal states are not redrawn. */
export class ChangeTracker {
  private last: string | undefined

  /** Whether the values differ from those of the previous call. */
  changed(...parts: readonly (string | number | boolean)[]): boolean {
    const key = parts.join(' ')
    const changed = key !== this.last
    this.last = key
    return changed
  }
}
