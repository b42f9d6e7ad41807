import { finite } from '../contract'
import type { GraphNode } from '../model/flow_graph'
import { isolated } from '../model/tokens'
import { count, percent } from '../presentation/wording'
import type { Filter } from './controls'
import type { Block, Row } from './layer_model'

// The elements of a layer's picture, and the layout of a sum.

export interface Box {
  x: number
  y: number
  width: number
  height: number
}

/** A node, drawn as its token. */
export interface Chip extends Box {
  node: GraphNode
  /** Negative factor: shows the bottom token. */
  flipped: boolean
  /** Text of a remainder, which is hatched; undefined for other nodes. */
  text: string | undefined
}

/** The band from a part's row into its sum's bar, or into its head. */
export interface Ribbon {
  node: GraphNode
  share: number
  x0: number
  y0: number
  h0: number
  x1: number
  y1: number
  h1: number
}

export interface Text {
  x: number
  y: number
  text: string
  style: 'title' | 'column' | 'number' | 'strong' | 'quiet' | 'source'
  anchor: 'start' | 'middle' | 'end'
  /** Truncate the text to this width. */
  width?: number
}

/** A bar for attention (0 to 1) or an activation. */
export interface Bar extends Box {
  kind: 'attention' | 'adds' | 'subtracts' | 'track' | 'strip'
}

/** A button that expands or collapses a head's W_O rows. */
export interface Toggle extends Box {
  /** `layer.head`. */
  head: string
  open: boolean
  text: string
}

/** The residual stream along the top: before the layer, after attention, after the MLP. */
export interface Rail {
  y: number
  segments: { node: GraphNode; x0: number; x1: number; share: number | undefined; label: string }[]
  /** Lines from an output's chip up to the rail. */
  joints: {
    node: GraphNode
    x: number
    /** x coordinate at which it meets the rail. */
    to: number
    y0: number
    y1: number
    share: number | undefined
    label: string
  }[]
}

export const ROW = 23
export const CHIP = 19
export const PAD = 14
/** Height of a panel's title and its columns' names. */
export const HEAD = 66
export const BAR = 12

/** The elements of one layer's picture, collected by the layout functions. */
export class Detail {
  height = 0
  readonly panels: Box[] = []
  readonly groups: Box[] = []
  readonly chips: Chip[] = []
  readonly ribbons: Ribbon[] = []
  readonly bars: Bar[] = []
  readonly texts: Text[] = []
  readonly toggles: Toggle[] = []
  /** Outlines of the sums' bars. */
  readonly sums: Box[] = []
  readonly rail: Rail = { y: 18, segments: [], joints: [] }

  constructor(readonly width: number) {}

  chip(node: GraphNode, x: number, y: number, width: number, flipped = false): void {
    this.chips.push({ ...chipBox(x, y, width), node, flipped, text: undefined })
  }

  /** A remainder with a text. */
  rest(node: GraphNode, text: string, x: number, y: number, width: number): void {
    this.chips.push({ ...chipBox(x, y, width), node, flipped: false, text })
  }

  text(
    x: number,
    y: number,
    text: string,
    style: Text['style'],
    anchor: Text['anchor'] = 'start',
    width?: number,
  ): void {
    this.texts.push({ x, y, text: text, style, anchor, ...(width === undefined ? {} : { width }) })
  }

  bar(kind: Bar['kind'], x: number, y: number, width: number, height: number): void {
    this.bars.push({ kind, x, y, width, height })
  }
}

function chipBox(x: number, y: number, width: number): Box {
  return { x, y: y + (ROW - CHIP) / 2, width, height: CHIP }
}

/** The number of a neuron, or of a row of W_O, after the reader's name for it. */
export function neuronName({ neuron, expert, annotation }: GraphNode): string {
  const number = expert === undefined ? `${neuron}` : `e${expert} ${neuron}`
  return annotation?.name ? `${isolated(annotation.name)} ${number}` : number
}

/** A bar for a value from -1 to 1, drawn from the middle to the right or left. */
export function signedBar(
  detail: Detail,
  value: number,
  x: number,
  y: number,
  width: number,
): void {
  const zero = x + width / 2
  const length = Math.max(0.5, Math.abs(value) * (width / 2))
  detail.bar('track', zero, y + 3, 1, ROW - 6)
  const start = value < 0 ? zero - length : zero
  detail.bar(value < 0 ? 'subtracts' : 'adds', start, y + 7, length, ROW - 14)
}

/** Position and width of a block. */
export interface Place {
  x: number
  y: number
  width: number
  /** Minimum height of its sum's bar. */
  bar: number
}

/** The bottom of a placed block, and the point that is joined to the rail. */
export interface Placed {
  bottom: number
  joint: { node: GraphNode; x: number; y: number } | undefined
}

/** The path of a ribbon between two vertical edges; `from` and `to` select a fraction of its width. */
export function band(ribbon: Ribbon, from = 0, to = 1): string {
  const { x0, x1 } = ribbon
  const middle = (x0 + x1) / 2
  const [a0, b0] = [ribbon.y0 + ribbon.h0 * from, ribbon.y0 + ribbon.h0 * to]
  const [a1, b1] = [ribbon.y1 + ribbon.h1 * from, ribbon.y1 + ribbon.h1 * to]
  return (
    `M${x0},${a0}C${middle},${a0},${middle},${a1},${x1},${a1}` +
    `L${x1},${b1}C${middle},${b1},${middle},${b0},${x0},${b0}Z`
  )
}

// A sum: the ribbons of its rows end in one bar, stacked in row order so that they do not cross.

const OUTPUT = 92 // width of the output's chip

/** A row and its y coordinate. */
export interface Stacked {
  row: Row
  y: number
}

/** The last columns of a block: the value chips, and the shares where ribbons start. */
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
  columns: readonly (readonly [x: number, name: string, anchor?: Text['anchor']])[],
): void {
  detail.text(at.x + PAD, at.y + 17, title, 'title')
  const reads = block.input?.reading?.top[0]?.token.label
  const x = at.x + PAD + title.length * 8.6 + 14
  const room = at.width - PAD - OUTPUT - 12 - (x - at.x)
  if (reads !== undefined) detail.text(x, at.y + 17.5, `input ${reads}`, 'quiet', 'start', room)
  const line = facts.filter(Boolean).join(' · ')
  detail.text(at.x + PAD, at.y + 35, line, 'quiet', 'start', at.width - 2 * PAD - OUTPUT)
  for (const [left, name, anchor] of columns) {
    detail.text(left, at.y + 55, name, 'column', anchor ?? 'start')
  }
}

/** Whether the trace does not divide the block's result into parts. */
export function isWhole({ rows, rest }: Block<Row>): boolean {
  return rows.length === 0 && rest === undefined
}

/** "25 of 512 neurons · 2 % cancels out". */
export function summary(block: Block<Row>, shown: number, all: number | undefined, what: string) {
  if (isWhole(block)) return [`not divided into ${what}`]
  const parts = [...block.rows, block.rest, block.bias].map((row) => finite(row?.share))
  const minus = parts.filter((share) => share < 0).reduce((a, b) => a + b, 0)
  return [
    all && all > shown ? `${shown} of ${count(all)} ${what}` : `${shown} ${what}`,
    minus < -0.005 ? `${Math.round(-minus * 100)} % cancels out` : '',
  ]
}

export function shownShare(kept: number): string[] {
  return kept < 0.9995 ? [`rows with ${Math.round(kept * 100)} % of the share shown`] : []
}

/** Places the rows of the remainder and the bias; returns the new bottom. */
export function placeRemainder(
  detail: Detail,
  rows: Stacked[],
  block: Block<Row>,
  filter: Filter,
  at: Ends,
  y: number,
  restLabel: string,
): number {
  let bottom = y
  if (block.rest && !filter.hidden.has('rest')) {
    detail.rest(block.rest.node, restLabel, at.x, bottom, at.width)
    rows.push({ row: block.rest, y: bottom })
    bottom += ROW
  }
  const isPart = block.sum?.kind !== 'ATTENTION_CONCAT' // its parts are only the heads
  if (block.bias && isPart && !filter.hidden.has('bias')) {
    detail.text(at.x - 8, bottom + ROW / 2, 'bias', 'quiet', 'end')
    detail.chip(block.bias.node, at.x, bottom, at.width)
    rows.push({ row: block.bias, y: bottom })
    bottom += ROW
  }
  return bottom
}

/** Reports the number of rows hidden by a filter; returns the new bottom. */
export function placeHiddenRows(detail: Detail, hidden: number, what: string, at: Ends, y: number) {
  if (hidden === 0) return y
  detail.text(at.x + at.width, y + ROW / 2, `${hidden} ${what} hidden`, 'quiet', 'end')
  return y + ROW
}

export function restLabel(all: number | undefined, shown: number): string {
  return all && all > shown ? `${count(all - shown)} more` : 'the rest'
}

/** Places the sum's bar, the ribbons into it and the output's chip above it. */
export function placeSum(
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
  const mass = rows.reduce((sum, { row }) => sum + Math.abs(finite(row.share)), 0)
  if (mass === 0) return
  detail.sums.push(bar)
  let y = bar.y
  for (const { row, y: rowY } of rows) {
    const share = row.share ?? 0
    const h1 = (Math.abs(finite(share)) / mass) * bar.height
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
