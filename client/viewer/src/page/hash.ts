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
