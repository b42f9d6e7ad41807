import assert from 'node:assert/strict'
import { test } from 'node:test'
import { charactersIn } from '../src/presentation/svg'
import { EMBEDDING, flagLine, layout, nearest, panelWidth } from '../src/trace/overview_layout'

const layers = [0, 1, 2, 3]

test('few positions are all labelled, side by side', () => {
  const at = layout(8, layers, 7, 1100)
  assert.ok(at.columns.every((column) => column.labelled))
  for (let i = 1; i < at.columns.length; i++) {
    const [left, right] = [at.columns[i - 1], at.columns[i]]
    assert.ok(left && right && left.x + left.width < right.x)
  }
})

for (const [positions, selected] of [
  [15, 14],
  [100, 0],
  [100, 50],
  [1000, 999],
] as const) {
  test(`of ${positions} positions ten are labelled, ${selected} among them, and all fit`, () => {
    const at = layout(positions, layers, selected, 1100)
    const labelled = at.columns.filter((column) => column.labelled).map((c) => c.position)
    assert.equal(labelled.length, 10)
    assert.ok(labelled.includes(selected))
    assert.ok(
      at.columns.every((column) => column.width > 0 && column.x + column.width < 1100 - 214),
    )
  })
}

test('of a long prompt the positions that are read have labels, wherever they are', () => {
  const at = layout(1000, layers, 999, 1100, [12, 500, 13])
  const labelled = at.columns.filter((column) => column.labelled).map((c) => c.position)
  assert.deepEqual(labelled, [12, 13, 500, 993, 994, 995, 996, 997, 998, 999])
  for (const [i, column] of at.columns.entries()) {
    const next = at.columns[i + 1]
    if (next) assert.ok(column.x + column.width <= next.x + 1e-9)
  }
  const last = at.columns[999]
  assert.ok(last && last.x + last.width < 1100 - 214)
})

test('in a narrow picture half of the labelled columns are those that are read', () => {
  const at = layout(10, layers, 9, 640, [2, 6])
  const labelled = at.columns.filter((column) => column.labelled).map((c) => c.position)
  assert.deepEqual(labelled, [2, 6, 8, 9])
})

test('the selected column of a long prompt is wider than the other labelled ones', () => {
  const { columns } = layout(100, layers, 50, 1100)
  const others = columns.filter((c) => c.labelled && c.position !== 50).map((c) => c.width)
  assert.ok((columns[50]?.width ?? 0) > 1.4 * Math.max(...others))
})

test('thirty layers have cells as high as a label, and room for bars and arcs between them', () => {
  const thirty = Array.from({ length: 30 }, (_, i) => i)
  const { cellHeight, rows } = layout(10, thirty, 9, 1100)
  assert.ok(cellHeight >= 17)
  const pitch = (rows[0]?.y ?? 0) - (rows[1]?.y ?? 0)
  assert.ok(pitch - cellHeight >= 8)
})

test('a figure of one column has labels of six characters', () => {
  const thirty = Array.from({ length: 30 }, (_, i) => i)
  for (const positions of [10, 60]) {
    const at = layout(positions, thirty, positions - 1, 450, [2, 6])
    const labelled = at.columns.filter((column) => column.labelled)
    assert.deepEqual(
      labelled.map(({ position }) => position),
      [2, 6, positions - 1],
    )
    for (const column of labelled) assert.ok(charactersIn(column.width - 8) >= 6)
    assert.ok(at.slim && at.panelX + panelWidth(450) <= 450)
  }
})

test('layers go upward from the embedding', () => {
  const { rows } = layout(8, layers, 7, 1100)
  assert.deepEqual(
    rows.map((row) => row.layer),
    [EMBEDDING, ...layers],
  )
  assert.ok(rows.every((row, i) => i === 0 || row.y < (rows[i - 1]?.y ?? 0)))
})

test('the nearest cell is found from anywhere', () => {
  const at = layout(8, layers, 7, 1100)
  const [column, row] = [at.columns[3], at.rows[2]]
  assert.ok(column && row)
  const found = nearest(at, column.x + 5, row.y + 5)
  assert.equal(found?.column.position, 3)
  assert.equal(found?.row.layer, 1)
  assert.equal(nearest(at, 0, 0)?.column.position, 0)
})

test('the line of the label “first from” ends at the label, between rows and below the panel', () => {
  assert.equal(flagLine(300, 120, 326, 120), 'M300,120H338')
  assert.equal(flagLine(300, 120, 326, 640), 'M300,120H318V640H338')
})
