// Which parts are shown: filters hide rows, and say how much of the sum they hide.
import type { Row } from './detail/model'
import type { TraceState } from './state'

export interface Filter {
  /** Equal for equal filters. */
  key: string
  /** Smallest |share| shown, as a fraction. */
  minimum: number
  sign: '' | '+' | '-'
  /** Kinds of rows that are hidden. */
  hidden: ReadonlySet<string>
  /** Heads whose rows of W_O are listed, as `layer.head`. */
  opened: ReadonlySet<string>
}

export function filterOf(state: TraceState): Filter {
  const sign = state.get('sign')
  return {
    key: (['hide', 'min', 'sign', 'heads'] as const).map((key) => state.get(key)).join(' '),
    minimum: (Number(state.get('min')) || 0) / 100,
    sign: sign === '+' || sign === '-' ? sign : '',
    hidden: new Set(state.list('hide')),
    opened: new Set(state.list('heads')),
  }
}

export interface Filtered<Item extends Row> {
  shown: Item[]
  hidden: number
  /** Share of the sum's absolute mass that the rows shown make up. */
  kept: number
}

/** The rows that pass; `kept` is of the rows given, the remainder of the sum not among them. */
export function passing<Item extends Row>(rows: readonly Item[], filter: Filter): Filtered<Item> {
  const shown = rows.filter((row) => passes(row.share ?? 0, filter))
  const all = mass(rows)
  return { shown, hidden: rows.length - shown.length, kept: all > 0 ? mass(shown) / all : 1 }
}

function passes(share: number, filter: Filter): boolean {
  if (Math.abs(share) < filter.minimum) return false
  return filter.sign === '' || (filter.sign === '+' ? share > 0 : share < 0)
}

function mass(rows: readonly Row[]): number {
  return rows.reduce((sum, row) => sum + Math.abs(row.share ?? 0), 0)
}
