// What a selection, a search or an open layer changes in the overview: classes alone, so that nothing
// is placed anew.
import type { FlowGraph } from '../../graph/graph'
import { chipClass, type Marks } from '../../parts/look'
import { classify, type Svg } from '../../parts/svg'
import type { Arc } from './arcs'
import type { Cell } from './draw'
import type { Row } from './layout'

export function markGrid(
  svg: Svg,
  graph: FlowGraph,
  position: number,
  marks: Marks,
  shown: readonly number[],
): void {
  classify<Cell>(svg, '.cells .row > g', (cell) => {
    const own = cell.column.position === position ? 'cell of-selected' : 'cell'
    return `${own} ${chipClass(cell.node, graph, marks)}`
  })
  classify<Arc>(svg, '.arcs path', (arc) => arcClass(arc, position, marks))
  classify<Row>(svg, '.rows text', (row) => (shown.includes(row.layer) ? 'shown' : ''))
}

function arcClass(arc: Arc, position: number, marks: Marks): string {
  const classes = ['arc', arc.share < 0 ? 'subtracts' : 'adds']
  if (arc.position === position) classes.push('into-selected')
  if (arc.value === marks.selected || marks.path?.has(arc.value)) classes.push('chosen')
  return classes.join(' ')
}
