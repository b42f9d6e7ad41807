import { finite } from '../contract'
import type { Scored } from '../model/flow_graph'
import {
  type Component,
  type GradientModel,
  type Matrix,
  matrixName,
  placeId,
  placeOf,
  promotionRank,
  type Segment,
  shiftOf,
} from '../model/gradient'
import type { Token } from '../model/tokens'
import { normPaint, normSteps, rankBin } from '../presentation/colours'
import {
  type HeatCell,
  type HeatColumn,
  type HeatMap,
  LEGEND_LINE,
  type Legend,
  type Line,
} from '../presentation/heatmap'
import { columnsIn, type Group, GUTTER } from '../presentation/svg'
import { at, count, measure } from '../presentation/wording'

// The heat maps: the tokens of inputs and VJPs, and the target's rank.

const SEGMENT = [110, 144] as const // px; fits the numbers, and the longest name

export interface Shown {
  width: number
  /** Whether the map is wider than the window. */
  scrolls: boolean
  /** Whether two maps fit beside each other. */
  sideBySide: boolean
  selected: string
  /** '', 'promoted' or 'suppressed'. */
  ends: string
  colour: Scale['colour']
  /** Whether colours show the target's rank instead. */
  byRank: boolean
  /** Index of the target among those of the loss. */
  target: number
  /** Expert to show; undefined = the one with the largest component at each place. */
  expert: number | undefined
  /** Matches the tokens to highlight. */
  wanted: ((token: Token) => boolean) | undefined
}

/** What the colours of a map show, and the value of the darkest one. */
export interface Scale {
  colour: '' | 'size'
  /** The largest value, without a position whose values are far beyond all others. */
  largest: number
  /** The largest value of that position, e.g. of the attention sink. */
  beyond: { position: number; value: number } | undefined
}

const FAR = 2 // times the largest value of the other positions

/** The scale of a matrix's map; one position that is not the last does not own it. */
export function scaleOf(model: GradientModel, kind: string, colour: Scale['colour']): Scale {
  const largest = new Map<number, number>()
  for (const { components } of model.of(kind)) {
    for (const component of components) {
      const { position } = component
      const value = finite(valueIn(component, colour))
      largest.set(position, Math.max(largest.get(position) ?? 0, value))
    }
  }
  const [first, second] = [...largest].sort((a, b) => b[1] - a[1])
  const [position = 0, value = 0] = first ?? []
  const others = second?.[1] ?? 0
  const far = position !== model.prompt.length - 1 && others > 0 && value > FAR * others
  return far
    ? { colour, largest: others, beyond: { position, value } }
    : { colour, largest: value, beyond: undefined }
}

function valueIn(component: Component, colour: Scale['colour']): number {
  return colour === 'size' ? component.size : component.vjpNorm
}

/** What a descent step promotes and suppresses, or the input's top token, by layer and position. */
export function factorMap(model: GradientModel, kind: string, shown: Shown, scale: Scale): HeatMap {
  const two = shown.ends === '' && model.of(kind)[0]?.promoted !== ''
  return map(model, shown, two ? 42 : 26, (layer, position) => {
    const found = model.at({ layer, position, kind }, shown.expert)
    if (!found || found.size === 0) return undefined
    return {
      ...markedCell(found, shown),
      lines: linesOf(found, shown.ends),
      paint: shown.byRank
        ? `bin-${rankBin(rankOf(found, model, shown), model.vocabulary)}`
        : normPaint(valueIn(found, scale.colour), scale.largest),
      sentence: sentence(found, model),
    }
  })
}

/** The target's rank in a component, from the promoted end. */
function rankOf(component: Component, model: GradientModel, shown: Shown): number | undefined {
  const rank = component.targetRanks[shown.target]
  return rank === undefined
    ? undefined
    : promotionRank(rank, component.matrix.promoted, model.vocabulary)
}

/** The target's rank in each component by layer and position, from the promoted end. */
export function rankMap(model: GradientModel, kind: string, shown: Shown): HeatMap {
  return map(model, shown, 24, (layer, position) => {
    const found = model.at({ layer, position, kind }, shown.expert)
    if (!found || found.size === 0) return undefined
    const rank = rankOf(found, model, shown)
    if (rank === undefined) return undefined
    const token = model.targets[shown.target]?.label ?? 'the target'
    return {
      ...markedCell(found, shown),
      lines: [{ mark: '', text: count(rank), strong: rank === 0 }],
      paint: `bin-${rankBin(rank, model.vocabulary)}`,
      sentence: `is the ${rankName(found.matrix.promoted)} of ${token} in ${where(found, model)}`,
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

/** The mean norm and the target's mean rank, from the promoted end, by segment of the prompt. */
export function segmentMap(
  model: GradientModel,
  kind: string,
  scale: Scale,
  room: number,
): HeatMap {
  const rows = model.segments.filter((segment) => segment.kind === kind)
  const names = [...new Set(rows.map((row) => row.segment))]
  const promoted = model.of(kind)[0]?.promoted
  const rank = (row: Segment) =>
    row.rank === undefined ? undefined : promotionRank(row.rank, promoted, model.vocabulary)
  const pitch = Math.min(SEGMENT[1], Math.max(SEGMENT[0], (room - GUTTER) / names.length))
  const columns = names.map((name, i) => ({
    key: name,
    label: name.replaceAll('_', ' '),
    x: GUTTER + i * pitch,
    width: pitch - 4,
    labelled: true,
    selected: false,
  }))
  const layers = [...new Set(rows.map((row) => row.layer))].sort((a, b) => b - a)
  return {
    columns,
    rows: layers.map((layer) => ({ key: String(layer), label: `L${layer}`, selected: false })),
    cellHeight: 40,
    width: GUTTER + names.length * pitch,
    cell: (layer, name) => {
      const row = rows.find((r) => r.segment === name && r.layer === Number(layer))
      return row && segmentCell(row, scale.largest, rank(row))
    },
  }
}

function segmentCell(row: Segment, largest: number, meanRank: number | undefined): HeatCell {
  const rank = meanRank === undefined ? '' : `rank ${count(Math.round(meanRank))}`
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

/** What a descent step promotes and suppresses most, or an input's top token. */
function linesOf(component: Component, ends: string): Line[] {
  const line = (mark: string, found: Scored | undefined, strong: boolean) => ({
    mark,
    text: found?.token.label ?? '—',
    strong,
  })
  const shift = shiftOf(component)
  if (!shift) return [line('', component.reading?.top[0], false)]
  const promoted = line('↑', shift.promoted[0], true)
  const suppressed = line('↓', shift.suppressed[0], false)
  if (ends === 'promoted') return [promoted]
  return ends === 'suppressed' ? [suppressed] : [promoted, suppressed]
}

/** The name of a matrix's ranks. */
export function rankName(promoted: Matrix['promoted']): string {
  return promoted === '' ? 'rank' : 'promotion rank'
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
const END = 14 + STEPS * WIDTH + 8 // px, where the text after the steps begins
const LETTER = 5.6 // px

/** The legend of a scale below a picture of this width; what does not fit is on a second line. */
export function scaleLegend(scale: Scale, prompt: readonly Token[], width: number): Legend {
  const { colour, largest, beyond } = scale
  const name = colour === 'size' ? '|x||δ|' : '|δ|'
  const text = `${measure(largest)} · ${name}, square-root scale`
  const more = beyond ? `${at(beyond.position, prompt)} up to ${measure(beyond.value)}` : ''
  const whole = more ? `${text}; ${more}` : text
  const fits = GUTTER + END + whole.length * LETTER <= width
  const lines = fits || !more ? [whole] : [text, more]
  return { key: whole, lines: lines.length, draw: (group) => drawSteps(group, lines) }
}

function drawSteps(group: Group, lines: readonly string[]): void {
  group
    .selectAll('rect')
    .data(normSteps(STEPS))
    .join('rect')
    .attr('x', (_, i) => 14 + i * WIDTH)
    .attr('width', WIDTH + 0.5)
    .attr('height', 12)
    .style('fill', (colour) => colour)
  group
    .selectAll('text')
    .data([
      { x: 0, y: 10, text: '0' },
      ...lines.map((text, i) => ({ x: END, y: 10 + i * LEGEND_LINE, text })),
    ])
    .join('text')
    .attr('class', 'column')
    .attr('x', (label) => label.x)
    .attr('y', (label) => label.y)
    .text((label) => label.text)
}
