import assert from 'node:assert/strict'
import { test } from 'node:test'
import { InvalidQuestion, integers, QUESTION, VIEWS } from '../src/live/question'
import { interventionOf, partName } from '../src/model/knock_out'

test('ranges and negative numbers are read', () => {
  assert.deepEqual(integers('Layers', ' 0-3, 7 '), [0, 1, 2, 3, 7])
  assert.deepEqual(integers('Positions', '-1,3'), [-1, 3])
  assert.deepEqual(integers('Layers', ''), [])
})

test('what is not a number is refused in words', () => {
  for (const text of ['abc', '3-1', '1.5', '0-', '1e3', '9999999999']) {
    assert.throws(
      () => VIEWS.trace.request({ ...QUESTION, layers: text }),
      (error) => error instanceof InvalidQuestion && error.message.startsWith('invalid layers'),
      text,
    )
  }
  for (const temperature of ['hot', 'Infinity', 'NaN']) {
    assert.throws(() => VIEWS.generation.request({ ...QUESTION, temperature }), InvalidQuestion)
  }
})

test('a conversation that ends with the assistant is continued', () => {
  for (const [role, continued] of [
    ['user', false],
    ['assistant', true],
  ] as const) {
    const chat = JSON.stringify([[role, 'Hello']])
    const messages = [{ role, content: 'Hello' }]
    assert.deepEqual(VIEWS.trace.request({ ...QUESTION, chat }).input, {
      chat: { messages, continueFinalMessage: continued },
    })
  }
})

test('a node id names the intervention that removes it', () => {
  const where = { layers: [3], positions: [7] }
  assert.deepEqual(interventionOf('L3/p7/HEAD_OUTPUT/h2'), {
    ...where,
    site: 'SITE_HEAD_RESULT',
    heads: [2],
    zero: true,
  })
  assert.deepEqual(interventionOf('L3/p7/MEMORY_VALUE/h2/s4'), {
    ...where,
    site: 'SITE_ATTENTION_PATTERN',
    heads: [2],
    sourcePositions: [4],
    block: true,
  })
  assert.deepEqual(interventionOf('L3/MLP_VALUE/n911'), {
    layers: [3],
    site: 'SITE_NEURONS',
    neurons: [911],
    zero: true,
  })
  assert.deepEqual(interventionOf('L3/p7/MLP_VALUE/e2/n9'), {
    ...where,
    site: 'SITE_NEURONS',
    experts: [2],
    neurons: [9],
    zero: true,
  })
  for (const id of ['p7/PREDICTION', 'L3/p7/BLOCK_OUTPUT', 'x']) {
    assert.equal(interventionOf(id), undefined, id)
  }
  assert.equal(partName('L3/HEAD_OUTPUT/h2'), 'L3 head 2')
  assert.equal(partName('L3/p7/MLP_VALUE/e2/n9'), 'L3 expert 2 neuron 9 at position 7')
})
