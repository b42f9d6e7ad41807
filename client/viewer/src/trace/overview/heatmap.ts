// The columns that are too narrow for text: one path for each colour, so that thousands of cells cost
// seven elements, and an exported or printed picture has them too.
import { BINS } from '../../colour/bins'
import { binOf } from '../../parts/look'
import type { Group } from '../../parts/svg'
import { type Grid, residualAt } from './draw'

/** The cells of the columns that carry no text, as the outline of each bin's. */
export function heatPaths({ graph, at }: Grid): string[] {
  const paths = BINS.map(() => '')
  for (const column of at.columns) {
    if (column.labelled) continue
    for (const row of at.rows) {
      const node = residualAt(graph, row.layer, column.position)
      if (!node) continue
      const width = column.width.toFixed(2)
      paths[binOf(node, graph)] +=
        `M${column.x.toFixed(2)},${row.y}h${width}v${at.cellHeight}h-${width}z`
    }
  }
  return paths
}

export function drawHeatmap(group: Group, grid: Grid): void {
  group
    .selectAll('path')
    .data(heatPaths(grid))
    .join('path')
    .attr('class', (_, bin) => `heat-${bin}`)
    .attr('d', (path) => path)
}
