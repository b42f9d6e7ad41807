// Run a table of checks against a server with @grpc/grpc-js, which loads the .proto files.
//
//   node tests/conformance/client.mjs 127.0.0.1:50051 SUITE.json PROTOS...
//
// README.md describes the table. PROTOS are the folders of the contract and of google/rpc.

import { readFileSync } from 'node:fs'
import grpc from '@grpc/grpc-js'
import protoLoader from '@grpc/proto-loader'

const MESSAGE_LIMIT = 2 ** 20
const [address, table, ...includeDirs] = process.argv.slice(2)

// The JSON in which all drivers compare: enums by name, int64 and bytes as texts, unset fields absent.
const JSON_FORM = { keepCase: true, longs: String, enums: String, bytes: String }
const files = ['januslens/v1/service.proto', 'google/rpc/status.proto', 'google/rpc/error_details.proto']
const loaded = grpc.loadPackageDefinition(protoLoader.loadSync(files, { includeDirs, ...JSON_FORM }))
const { IntrospectionService } = loaded.januslens.v1
const channelOptions = { 'grpc.max_receive_message_length': MESSAGE_LIMIT }
const client = new IntrospectionService(address, grpc.credentials.createInsecure(), channelOptions)

const DETAILS = {
  'google.rpc.BadRequest': loaded.google.rpc.BadRequest,
  'google.rpc.ErrorInfo': loaded.google.rpc.ErrorInfo,
  'google.rpc.RetryInfo': loaded.google.rpc.RetryInfo,
  'januslens.v1.LimitViolations': loaded.januslens.v1.LimitViolations,
}

// Replace `$name` by a saved value, and {"repeat": text, "times": n} by the long text.
function expanded(value, saved) {
  if (typeof value === 'string') return value.startsWith('$') ? saved[value.slice(1)] : value
  if (Array.isArray(value)) return value.map((part) => expanded(part, saved))
  if (value === null || typeof value !== 'object') return value
  if ('repeat' in value) return value.repeat.repeat(value.times)
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, expanded(part, saved)]))
}

// Send the request of a check, and return what came back.
function call(check, saved) {
  const { rpc, metadata = {}, timeout_seconds = 60 } = check
  const sent = new grpc.Metadata()
  for (const [name, value] of Object.entries(metadata)) sent.set(name, value)
  const request = expanded(check.request, saved)
  const options = { deadline: Date.now() + 1000 * timeout_seconds }
  const seen = { status: 'OK', messages: [], headers: {}, details: {} }
  return new Promise((resolve) => {
    const failed = (error) => {
      seen.status = grpc.status[error.code]
      seen.details = details(error.metadata)
      resolve(seen)
    }
    if (IntrospectionService.service[rpc].responseStream) {
      const stream = client[rpc](request, sent, options)
      stream.on('metadata', (headers) => Object.assign(seen.headers, headers.getMap()))
      stream.on('data', (message) => {
        if ('waiting' in message) return // no part of the result
        seen.messages.push(message)
        if (seen.messages.length === check.cancel_after) stream.cancel()
      })
      stream.on('error', failed)
      stream.on('end', () => setImmediate(resolve, seen)) // an error comes before or right after it
    } else {
      const unary = client[rpc](request, sent, options, (error, message) => {
        if (error) return failed(error)
        seen.messages.push(message)
        resolve(seen)
      })
      unary.on('metadata', (headers) => Object.assign(seen.headers, headers.getMap()))
    }
  })
}

// Return the details of an error by name.
function details(trailers) {
  const decoded = {}
  for (const packed of trailers?.get('grpc-status-details-bin') ?? []) {
    for (const { type_url, value } of loaded.google.rpc.Status.deserialize(packed).details) {
      const name = type_url.split('/').at(-1)
      if (name in DETAILS)
        decoded[name.split('.').at(-1)] = DETAILS[name].deserialize(Buffer.from(value, 'base64'))
    }
  }
  return decoded
}

// Return the value at a path, undefined if there is none; `*` collects from every element.
function found(value, [step, ...rest]) {
  if (step === undefined) return value
  if (step === '*')
    return (value ?? []).map((part) => found(part, rest)).filter((part) => part !== undefined)
  return found(Array.isArray(value) ? value.at(Number(step)) : value?.[step], rest)
}

// Compare a value with what the table expects of it.
function holds(value, expected) {
  if (expected === null || typeof expected !== 'object' || Array.isArray(expected))
    return JSON.stringify(value) === JSON.stringify(expected)
  if ('absent' in expected) return value === undefined
  if ('near' in expected) return Math.abs(Number(value) - expected.near) <= expected.within
  if ('at_least' in expected) return Number(value) >= expected.at_least
  if ('count' in expected) return Array.isArray(value) && value.length === expected.count
  if ('includes' in expected) return Array.isArray(value) && value.includes(expected.includes)
  return typeof value === 'string' && new RegExp(expected.matches).test(value)
}

// Return what breaks the rules of every stream: header, items, summary; numbered from 0.
function streamFaults(messages) {
  const faults = []
  messages.forEach((message, number) => {
    if (Number(message.sequence ?? 0) !== number)
      faults.push(`message ${number} has sequence ${message.sequence}`)
    if ('header' in message !== (number === 0))
      faults.push(`message ${number}: expected a header in the first message only`)
    if ('summary' in message !== (number === messages.length - 1))
      faults.push(`message ${number}: expected a summary in the last message only`)
  })
  return faults
}

// Run one check, return every difference, and save what later checks use.
async function faultsOf(check, saved) {
  const seen = await call(check, saved)
  const { rpc, status = 'OK', expect = {}, save = {} } = check
  const faults = seen.status === status ? [] : [`status ${seen.status}, expected ${status}`]
  if (seen.status === 'OK' && IntrospectionService.service[rpc].responseStream)
    faults.push(...streamFaults(seen.messages))
  for (const [path, expected] of Object.entries(expect)) {
    const value = found(seen, path.split('.'))
    if (!holds(value, expanded(expected, saved)))
      faults.push(`${path}: ${JSON.stringify(value)?.slice(0, 200)}, expected ${JSON.stringify(expected)}`)
  }
  for (const [name, path] of Object.entries(save)) saved[name] = found(seen, path.split('.'))
  return faults
}

const { checks } = JSON.parse(readFileSync(table, 'utf8'))
const saved = {}
let failed = 0
for (const check of checks) {
  const faults = await faultsOf(check, saved)
  failed += faults.length > 0
  for (const fault of faults) console.log(`${check.name}: ${fault}`)
}
client.close()
console.log(`${checks.length - failed} passed, ${failed} failed`)
process.exitCode = failed ? 1 : 0
