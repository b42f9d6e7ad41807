import assert from 'node:assert/strict'
import { test } from 'node:test'
import { rankBin } from '../src/presentation/colours'

test('ranks are binned from the nearer end', () => {
  const large = 50_257
  const bins = [0, 1, 9, 10, 99, 100, 999, 1000, large - 1001, large - 1000, large - 100, large - 1]
  assert.deepEqual(
    bins.map((rank) => rankBin(rank, large)),
    [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 6],
  )
})

test('a small vocabulary has no middle bin', () => {
  assert.equal(rankBin(490, 982), 3)
  assert.equal(rankBin(491, 982), 5)
  assert.equal(rankBin(900, 982), 6)
})

test('an unknown size has no far end; an unknown rank is in the middle', () => {
  assert.equal(rankBin(50_000, undefined), 4)
  assert.equal(rankBin(undefined, 100), 4)
})
