import { finite } from '../contract'
import {
  type Component,
  type GradientModel,
  matrixName,
  placeId,
  placeOf,
  type Segment,
} from '../model/gradient'
import type { Token } from '../model/tokens'
import { BINS, normPaint, normSteps, rankBin } from '../presentation/colours'
import type { HeatCell, HeatColumn, HeatMap, Legend, Line } from '../presentation/heatmap'
import { columnsIn, type Group, GUTTER } from '../presentation/svg'
import { at, count, decimals, measure } from '../presentation/wording'

// The heat maps: the tokens of inputs and VJPs, and the target's rank.

const SEGMENT = 144 // px; fits the longest name

export interface Shown {
  width: number
  /** Whether the map is wider than the window. */
  scrolls: boolean
  selected: string
  /** '', 'top' or 'bottom'. */
  ends: string
  /** Index of the target among those of the loss. */
  target: number
  /** Expert to show; undefined = the one with the largest component at each place. */
  expert: number | undefined
  /** Matches the tokens to highlight. */
  wanted: ((token: Token) => boolean) | undefined
}

/** Both ends of each component's ranking by layer and position, coloured by |δ|. */
export function factorMap(model: GradientModel, kind: string, shown: Shown): HeatMap {
  const largest = largestNorm(model, kind)
  return map(model, shown, shown.ends === '' ? 42 : 26, (layer, position) => {
    const found = model.at({ layer, position, kind }, shown.expert)
    if (!found || found.size === 0) return undefined
    return {
      ...markedCell(found, shown),
      lines: linesOf(found, shown.ends),
      paint: normPaint(found.vjpNorm, largest),
      sentence: sentence(found, model),
    }
  })
}

/** The rank of the target in each component by layer and position. */
export function rankMap(model: GradientModel, kind: string, shown: Shown): HeatMap {
  return map(model, shown, 24, (layer, position) => {
    const found = model.at({ layer, position, kind }, shown.expert)
    const rank = found?.targetRanks[shown.target]
    if (!found || found.size === 0 || rank === undefined) return undefined
    const token = model.targets[shown.target]?.label ?? 'the target'
    return {
      ...markedCell(found, shown),
      lines: [{ mark: '', text: count(rank), strong: rank === 0 }],
      paint: `bin-${rankBin(rank, model.vocabulary)}`,
      sentence: `is the rank of ${token} in ${where(found, model)}`,
    }
  })
}

/** The properties shared by all cells of a component. */
function markedCell(component: Component, { selected, wanted }: Shown) {
  const { matrix, position, reading } = component
  const id = placeId({ layer: matrix.layer, position, kind: matrix.kind })
  const lists = [...(reading?.top ?? []), ...(reading?.bottom ?? [])]
  return {
    id,
    corner: matrix.expert === undefined ? '' : `e${matrix.expert}`,
    selected: selected === id,
    found: wanted && lists.some(({ token }) => wanted(token)),
  }
}

/** The mean norm and the target's mean rank by segment of the prompt. */
export function segmentMap(model: GradientModel, kind: string): HeatMap {
  const rows = model.segments.filter((segment) => segment.kind === kind)
  const names = [...new Set(rows.map((row) => row.segment))]
  const largest = Math.max(...rows.map((row) => finite(row.norm)), 0)
  const columns = names.map((name, i) => ({
    key: name,
    label: name.replaceAll('_', ' '),
    x: GUTTER + i * SEGMENT,
    width: SEGMENT - 4,
    labelled: true,
    selected: false,
  }))
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => b - a)
  return {
    columns,
    rows: layers.map((layer) => ({ key: String(layer), label: `L${layer}`, selected: false })),
    cellHeight: 40,
    width: GUTTER + names.length * SEGMENT,
    cell: (layer, name) => {
      const row = rows.find((r) => r.segment === name && r.layer === Number(layer))
      return row && segmentCell(row, largest)
    },
  }
}

function segmentCell(row: Segment, largest: number): HeatCell {
  const rank = row.rank === undefined ? '' : `rank ${decimals(row.rank, 0)}`
  const text = row.segment.replaceAll('_', ' ')
  return {
    id: '',
    lines: [
      { mark: '', text: `|δ| ${measure(row.norm)}`, strong: true },
      { mark: '', text: rank, strong: false },
    ],
    corner: '',
    paint: normPaint(row.norm, largest),
    sentence: `means over layer ${row.layer}, ${text}`,
    selected: false,
    found: undefined,
  }
}

export function largestNorm(model: GradientModel, kind: string): number {
  const norms = model.of(kind).flatMap((matrix) => matrix.components.map((c) => c.vjpNorm))
  return norms.reduce((most, norm) => Math.max(most, finite(norm)), 0)
}

function map(
  model: GradientModel,
  shown: Shown,
  cellHeight: number,
  cell: (layer: number, position: number) => HeatCell | undefined,
): HeatMap {
  const chosen = placeOf(shown.selected)?.layer
  return {
    columns: columnsOf(model, shown),
    rows: model
      .layers()
      .reverse()
      .map((layer) => ({ key: String(layer), label: `L${layer}`, selected: layer === chosen })),
    cellHeight,
    width: shown.width,
    cell: (row, column) => cell(Number(row), Number(column)),
  }
}

/** The columns of the trace's overview, so that both pages show a token at the same place. */
function columnsOf(model: GradientModel, shown: Shown): HeatColumn[] {
  const chosen = placeOf(shown.selected)?.position
  const position = chosen ?? model.prompt.length - 1
  const columns = columnsIn(model.prompt.length, position, GUTTER, shown.width - GUTTER)
  return columns.map(({ position: at, x, width, labelled }, i) => ({
    key: String(at),
    label: model.prompt[at]?.label ?? '',
    x,
    // There are no arcs between these columns, so the gaps are smaller.
    width: labelled ? (columns[i + 1]?.x ?? x + width + 10) - x - 4 : width,
    labelled,
    selected: at === chosen,
  }))
}

/** The top and the bottom token; the one that a descent step promotes is bold. */
function linesOf(component: Component, ends: string): Line[] {
  const { promoted } = component.matrix
  const line = (mark: string, end: 'TOP' | 'BOTTOM', text: string | undefined) => ({
    mark,
    text: text ?? '—',
    strong: promoted === end,
  })
  const top = line('▲', 'TOP', component.reading?.top[0]?.token.label)
  const bottom = line('▼', 'BOTTOM', component.reading?.bottom[0]?.token.label)
  return ends === 'top' ? [top] : ends === 'bottom' ? [bottom] : [top, bottom]
}

/** `L3 FF2, at ␣of (7)`. */
export function where(component: Component, model: GradientModel): string {
  return `${matrixName(component.matrix)}, at ${at(component.position, model.prompt)}`
}

/** The accessible description: matrix, position and norm. */
function sentence(component: Component, model: GradientModel): string {
  return `${where(component, model)}, norm ${measure(component.vjpNorm)}`
}

// The legends are a part of the pictures, so that exported pictures have them.

const STEPS = 24
const WIDTH = 5
const BIN = 58

/** The legend of norms from 0 to `largest`. */
export function normLegend(largest: number): Legend {
  return { key: String(largest), draw: (group) => drawNorms(group, largest) }
}

/** The legend of rank bins. */
export function rankLegend(): Legend {
  return { key: 'ranks', draw: drawBins }
}

function drawNorms(group: Group, largest: number): void {
  group
    .selectAll('rect')
    .data(normSteps(STEPS))
    .join('rect')
    .attr('x', (_, i) => 14 + i * WIDTH)
    .attr('width', WIDTH + 0.5)
    .attr('height', 12)
    .style('fill', (colour) => colour)
  const end = 14 + STEPS * WIDTH + 8
  group
    .selectAll('text')
    .data([
      { x: 0, text: '0' },
      { x: end, text: `${measure(largest)} · |δ|, square-root scale` },
    ])
    .join('text')
    .attr('class', 'column')
    .attr('x', (label) => label.x)
    .attr('y', 10)
    .text((label) => label.text)
}

function drawBins(group: Group): void {
  group
    .selectAll('rect')
    .data(BINS)
    .join('rect')
    .attr('class', (_, bin) => `key bin-${bin}`)
    .attr('x', (_, bin) => bin * (BIN + 2))
    .attr('width', BIN)
    .attr('height', 18)
    .attr('rx', 3)
  group
    .selectAll('text')
    .data(BINS)
    .join('text')
    .attr('class', (_, bin) => `on-bin-${bin}`)
    .attr('x', (_, bin) => bin * (BIN + 2) + BIN / 2)
    .attr('y', 9.5)
    .attr('text-anchor', 'middle')
    .attr('dominant-baseline', 'central')
    .text((text) => text)
}
