// Inside a head: the rows of W_O through which it writes, another way of cutting attention's result
// into parts than by sources. They are listed on demand, with shares of the whole result.
import { percent } from '../../parts/numbers'
import type { Filter } from '../filter'
import { type Columns, WEIGHT } from './attention'
import type { Block, HeadRow } from './model'
import { type Detail, ROW, scaled } from './placing'

const MARGIN = 6

/** What stands for a head in the state: `layer.head`. */
export function headName(row: HeadRow): string {
  return `${row.node.layer}.${row.head}`
}

/** Height of a head's rows of W_O, 0 where they are not listed. */
export function outputHeight(row: HeadRow, filter: Filter): number {
  if (!filter.opened.has(headName(row)) || row.outputRows.length === 0) return 0
  return (row.outputRows.length + 1) * ROW + MARGIN
}

export function placeToggle(
  detail: Detail,
  row: HeadRow,
  filter: Filter,
  columns: Columns,
  y: number,
): void {
  const count = row.outputRows.length
  if (count === 0) return
  const open = filter.opened.has(headName(row))
  const words = `${open ? '▾' : '▸'} ${count} ${count === 1 ? 'row' : 'rows'} of W_O`
  const box = { x: columns.source, y: y + 2, width: 108, height: ROW - 4 }
  detail.toggles.push({ ...box, head: headName(row), open, words })
}

export function placeOutputRows(
  detail: Detail,
  row: HeadRow,
  block: Block<HeadRow>,
  columns: Columns,
  top: number,
): void {
  const all = block.rows.flatMap((head) => head.outputRows)
  const largest = Math.max(...all.map(({ node }) => Math.abs(node.activation ?? 0)), 1e-9)
  detail.text(columns.weight - 12, top + ROW / 2, 'row of W_O', 'column', 'end')
  detail.text(columns.weight + WEIGHT / 2 - 3, top + ROW / 2, 'activation', 'column', 'middle')
  detail.text(columns.value, top + ROW / 2, 'it writes', 'column')
  detail.text(columns.output, top + ROW / 2, 'of attention’s result', 'column')
  row.outputRows.forEach(({ node, share }, i) => {
    const y = top + (i + 1) * ROW
    const middle = y + ROW / 2
    const activation = node.activation ?? 0
    detail.text(columns.weight - 12, middle, `${node.neuron}`, 'number', 'end')
    scaled(detail, activation / largest, columns.weight, y, WEIGHT - 6)
    detail.chip(node, columns.value, y, columns.chip, activation < 0)
    if (share !== undefined) detail.text(columns.output, middle, percent(share), 'number')
  })
}
