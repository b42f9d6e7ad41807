// The columns that are too narrow for text, on a canvas: thousands of rectangles in milliseconds.
import { resolvedColour } from '../../page/theme'
import { binOf } from '../../parts/look'
import { type Grid, residualAt } from './draw'

export interface HeatCell {
  x: number
  y: number
  width: number
  height: number
  bin: number
}

/** Every residual of the columns that carry no text. */
export function heatCells({ graph, at }: Grid): HeatCell[] {
  const cells: HeatCell[] = []
  for (const column of at.columns) {
    if (column.labelled) continue
    for (const row of at.rows) {
      const node = residualAt(graph, row.layer, column.position)
      if (!node) continue
      const { x, width } = column
      cells.push({ x, y: row.y, width, height: at.cellHeight, bin: binOf(node, graph) })
    }
  }
  return cells
}

export function paintHeatmap(canvas: HTMLCanvasElement, grid: Grid): void {
  const scale = window.devicePixelRatio
  const { width, height } = grid.at
  const cells = heatCells(grid)
  canvas.hidden = cells.length === 0
  if (canvas.hidden) return
  canvas.width = Math.round(width * scale)
  canvas.height = Math.round(height * scale)
  canvas.style.width = `${width}px`
  canvas.style.height = `${height}px`
  const context = canvas.getContext('2d')
  if (!context) return
  context.scale(scale, scale)
  const colours = Array.from({ length: 7 }, (_, bin) => resolvedColour(`--bin-${bin}`))
  for (const cell of cells) {
    context.fillStyle = colours[cell.bin] ?? 'gray'
    context.fillRect(cell.x, cell.y, cell.width, cell.height)
  }
}
