// A sum: its rows' ribbons stacked into one bar in row order, so that they never cross; the rows that
// are no single part; and the sum's own chip.
import { count, percent } from '../../parts/numbers'
import type { Filter } from '../filter'
import type { Block, Row } from './model'
import { BAR, CHIP, type Detail, HEAD, PAD, type Place, type Placed, ROW } from './placing'

const OUTPUT = 92 // width of the output's chip

/** A row of the picture and the part that starts from it. */
export interface Stacked {
  row: Row
  y: number
}

/** Where a block's last columns are: the value chips, and the shares from which ribbons start. */
export interface Ends {
  x: number
  width: number
  share: number
}

export function heading(
  detail: Detail,
  at: Place,
  title: string,
  block: Block<Row>,
  facts: readonly string[],
  columns: readonly (readonly [x: number, name: string, anchor?: 'middle' | 'start'])[],
): void {
  detail.text(at.x + PAD, at.y + 17, title, 'title')
  const reads = block.input?.reading?.top[0]?.token.label
  const x = at.x + PAD + title.length * 8.6 + 14
  const room = at.width - PAD - OUTPUT - 12 - (x - at.x)
  if (reads !== undefined) detail.text(x, at.y + 17.5, `reads ${reads}`, 'quiet', 'start', room)
  const line = facts.filter(Boolean).join(' · ')
  detail.text(at.x + PAD, at.y + 35, line, 'quiet', 'start', at.width - 2 * PAD - OUTPUT)
  for (const [left, name, anchor] of columns) {
    detail.text(left, at.y + 55, name, 'column', anchor ?? 'start')
  }
}

/** "25 of 512 neurons · 2 % cancels out". */
export function summary(block: Block<Row>, shown: number, all: number | undefined, what: string) {
  const parts = [...block.rows, block.rest, block.bias].map((row) => row?.share ?? 0)
  const minus = parts.filter((share) => share < 0).reduce((a, b) => a + b, 0)
  return [
    all && all > shown ? `${shown} of ${count(all)} ${what}` : `${shown} ${what}`,
    minus < -0.005 ? `${Math.round(-minus * 100)} % cancels out` : '',
  ]
}

export function shownShare(kept: number): string[] {
  return kept < 0.9995 ? [`${Math.round(kept * 100)} % of these shown`] : []
}

/** The rows below the parts: what was left out, and the bias. Gives the new bottom. */
export function remainder(
  detail: Detail,
  rows: Stacked[],
  block: Block<Row>,
  filter: Filter,
  at: Ends,
  y: number,
  restWords: string,
): number {
  let bottom = y
  if (block.rest && !filter.hidden.has('rest')) {
    detail.rest(block.rest.node, restWords, at.x, bottom, at.width)
    rows.push({ row: block.rest, y: bottom })
    bottom += ROW
  }
  const isPart = block.sum?.kind !== 'ATTENTION_CONCAT' // whose parts are the heads alone
  if (block.bias && isPart && !filter.hidden.has('bias')) {
    detail.text(at.x - 8, bottom + ROW / 2, 'bias', 'quiet', 'end')
    detail.chip(block.bias.node, at.x, bottom, at.width)
    rows.push({ row: block.bias, y: bottom })
    bottom += ROW
  }
  return bottom
}

/** What a filter left out, in words. */
export function hiddenRows(detail: Detail, hidden: number, what: string, at: Ends, y: number) {
  if (hidden === 0) return y
  detail.text(at.x + at.width, y + ROW / 2, `${hidden} ${what} hidden`, 'quiet', 'end')
  return y + ROW
}

export function restWords(all: number | undefined, shown: number): string {
  return all && all > shown ? `${count(all - shown)} more` : 'the rest'
}

/** The bar along the block, the ribbons into it, the output's chip above it. */
export function finish(
  detail: Detail,
  at: Place,
  block: Block<Row>,
  rows: readonly Stacked[],
  ends: Ends,
  bottom: number,
): Placed {
  const top = at.y + HEAD
  const height = Math.max(ROW, at.bar, bottom - top)
  const barX = at.x + at.width - PAD - BAR
  stack(detail, rows, ends.share, { x: barX, y: top, width: BAR, height })
  const x = at.x + at.width - PAD - OUTPUT
  if (block.output) detail.chip(block.output, x, at.y + 7, OUTPUT)
  detail.panels.push({ x: at.x, y: at.y, width: at.width, height: HEAD + height + PAD })
  return {
    bottom: top + height + PAD,
    joint: block.output && { node: block.output, x: x + OUTPUT / 2, y: at.y + 9 },
  }
}

function stack(
  detail: Detail,
  rows: readonly Stacked[],
  x0: number,
  bar: { x: number; y: number; width: number; height: number },
): void {
  const mass = rows.reduce((sum, { row }) => sum + Math.abs(row.share ?? 0), 0)
  if (mass === 0) return
  detail.sums.push(bar)
  let y = bar.y
  for (const { row, y: rowY } of rows) {
    const share = row.share ?? 0
    const h1 = (Math.abs(share) / mass) * bar.height
    const h0 = Math.min(CHIP, Math.max(1, h1))
    detail.ribbons.push({
      node: row.node,
      share,
      x0,
      y0: rowY + (ROW - h0) / 2,
      h0,
      x1: bar.x,
      y1: y,
      h1,
    })
    detail.text(x0 - 4, rowY + ROW / 2, percent(share), 'number', 'end')
    y += h1
  }
}
