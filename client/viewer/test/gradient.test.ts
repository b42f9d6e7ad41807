import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { ComponentMessage } from '../src/contract'
import { scaleLegend, scaleOf, segmentMap } from '../src/gradient/maps'
import { GradientModel, promotionRank, shiftOf } from '../src/model/gradient'
import { normPaint } from '../src/presentation/colours'
import { rankLegend } from '../src/presentation/heatmap'

/** A gradient of three positions with these |δ| in FF2 of one layer. */
function gradient(norms: readonly number[]): GradientModel {
  const made = new GradientModel()
  const texts = [' a', ' b', ' c']
  made.feed({
    header: {
      promptTokens: texts.map((text, id) => ({ id, text })),
      targetTokenIds: [0],
      sizes: { nLayers: 1, vocabSize: 100 },
    },
  })
  const components: ComponentMessage[] = norms.map((vjpNorm, position) => ({
    position,
    inputNorm: 2,
    vjpNorm,
    size: 2 * vjpNorm,
    projection: { topTokenIds: [1], bottomTokenIds: [0] },
    targetRanks: [99],
  }))
  made.feed({
    matrix: {
      kind: 'MATRIX_KIND_FF2',
      projectedSide: 'GRADIENT_FACTOR_VJP',
      promotedEnd: 'RANKING_END_BOTTOM',
      components,
    },
  })
  return made
}

test('one position with far larger values does not own the scale', () => {
  const scale = scaleOf(gradient([202, 3, 24]), 'FF2', '')
  assert.equal(scale.largest, 24)
  assert.deepEqual(scale.beyond, { position: 0, value: 202 })
  assert.equal(scaleOf(gradient([202, 3, 24]), 'FF2', 'size').largest, 48)
})

test('the last position, where the loss is, may own the scale', () => {
  assert.equal(scaleOf(gradient([3, 2, 24]), 'FF2', '').largest, 24)
  assert.equal(scaleOf(gradient([3, 2, 24]), 'FF2', '').beyond, undefined)
})

test('a descent step promotes the end that the matrix names', () => {
  const [component] = gradient([1]).of('FF2')[0]?.components ?? []
  assert.ok(component)
  assert.equal(shiftOf(component)?.promoted[0]?.token.label, '␣a')
  assert.equal(shiftOf(component)?.suppressed[0]?.token.label, '␣b')
  assert.equal(promotionRank(99, 'BOTTOM', 100), 0)
  assert.equal(promotionRank(7, '', 100), 7)
})

test('legends have as many lines as fit in the width of their picture', () => {
  const model = gradient([202, 3, 24])
  const scale = scaleOf(model, 'FF2', '')
  const lines = (width: number) => [
    scaleLegend(scale, model.prompt, width).lines,
    rankLegend(width).lines,
  ]
  assert.deepEqual(lines(480), [1, 1])
  assert.deepEqual(lines(370), [2, 2])
})

test('a segment has the colour of its mean norm on the scale of the positions', () => {
  const model = gradient([202, 3, 24])
  model.feed({
    summary: {
      segments: [
        { kind: 'MATRIX_KIND_FF2', segment: 'PROMPT_SEGMENT_FIRST_TOKEN', meanVjpNorm: 202 },
        { kind: 'MATRIX_KIND_FF2', segment: 'PROMPT_SEGMENT_LAST_TOKEN', meanVjpNorm: 24 },
      ],
    },
  })
  const map = segmentMap(model, 'FF2', scaleOf(model, 'FF2', ''), 300)
  assert.equal(map.width, 300)
  const paints = map.columns.map(({ key }) => map.cell('0', key)?.paint)
  assert.deepEqual(paints, [normPaint(24, 24), normPaint(24, 24)])
})
