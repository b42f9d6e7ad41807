import com.google.gson.JsonArray;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import com.google.gson.JsonPrimitive;
import com.google.protobuf.Any;
import com.google.protobuf.DescriptorProtos.FileDescriptorProto;
import com.google.protobuf.DescriptorProtos.FileDescriptorSet;
import com.google.protobuf.Descriptors.Descriptor;
import com.google.protobuf.Descriptors.FileDescriptor;
import com.google.protobuf.Descriptors.MethodDescriptor;
import com.google.protobuf.DynamicMessage;
import com.google.protobuf.Message;
import com.google.protobuf.util.JsonFormat;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientInterceptors;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor.MethodType;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.protobuf.ProtoUtils;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import java.io.InputStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import java.util.regex.Pattern;

/**
 * Runs a table of checks against a server with grpc-java, and messages from descriptors of the .proto files.
 *
 * <pre>java -cp ... Conformance.java 127.0.0.1:50051 SUITE.json DESCRIPTORS</pre>
 *
 * README.md describes the table, and how protoc writes the descriptors.
 */
public final class Conformance {
  private static final int MESSAGE_LIMIT = 1 << 20;
  private static final String SERVICE = "januslens.v1.IntrospectionService";

  private final Map<String, FileDescriptor> files = new HashMap<>();
  private final JsonFormat.Printer printer = JsonFormat.printer().preservingProtoFieldNames();
  private final JsonObject saved = new JsonObject();
  private final ManagedChannel channel;

  private Conformance(String address, Path descriptors) throws Exception {
    Map<String, FileDescriptorProto> protos = new HashMap<>();
    for (FileDescriptorProto file : FileDescriptorSet.parseFrom(Files.readAllBytes(descriptors)).getFileList()) {
      protos.put(file.getName(), file);
    }
    for (String name : protos.keySet()) {
      build(name, protos);
    }
    channel = NettyChannelBuilder.forTarget(address).usePlaintext().maxInboundMessageSize(MESSAGE_LIMIT).build();
  }

  /** Runs the checks, prints those that fail, and exits with 1 if there are any. */
  public static void main(String[] arguments) throws Exception {
    Conformance client = new Conformance(arguments[0], Path.of(arguments[2]));
    JsonArray checks =
        JsonParser.parseString(Files.readString(Path.of(arguments[1]))).getAsJsonObject().getAsJsonArray("checks");
    int failed = 0;
    for (JsonElement check : checks) {
      List<String> faults = client.faults(check.getAsJsonObject());
      failed += faults.isEmpty() ? 0 : 1;
      faults.forEach(fault -> System.out.println(check.getAsJsonObject().get("name").getAsString() + ": " + fault));
    }
    client.channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
    System.out.println((checks.size() - failed) + " passed, " + failed + " failed");
    System.exit(failed == 0 ? 0 : 1);
  }

  private FileDescriptor build(String name, Map<String, FileDescriptorProto> protos) throws Exception {
    if (!files.containsKey(name)) {
      List<FileDescriptor> imports = new ArrayList<>();
      for (String imported : protos.get(name).getDependencyList()) {
        imports.add(build(imported, protos));
      }
      files.put(name, FileDescriptor.buildFrom(protos.get(name), imports.toArray(new FileDescriptor[0])));
    }
    return files.get(name);
  }

  private MethodDescriptor method(String rpc) {
    return files.get("januslens/v1/service.proto").findServiceByName("IntrospectionService").findMethodByName(rpc);
  }

  /** Runs one check, returns every difference, and saves what later checks use. */
  private List<String> faults(JsonObject check) throws Exception {
    JsonObject seen = call(check);
    List<String> faults = new ArrayList<>();
    String status = check.has("status") ? check.get("status").getAsString() : "OK";
    if (!seen.get("status").getAsString().equals(status)) {
      faults.add("status " + seen.get("status") + ", expected " + status);
    }
    if (seen.get("status").getAsString().equals("OK") && method(check.get("rpc").getAsString()).isServerStreaming()) {
      faults.addAll(streamFaults(seen.getAsJsonArray("messages")));
    }
    for (Map.Entry<String, JsonElement> item : members(check, "expect").entrySet()) {
      JsonElement value = found(seen, item.getKey().split("\\."), 0);
      if (!holds(value, expanded(item.getValue()))) {
        String text = String.valueOf(value);
        faults.add(item.getKey() + ": " + text.substring(0, Math.min(200, text.length()))
            + ", expected " + item.getValue());
      }
    }
    for (Map.Entry<String, JsonElement> item : members(check, "save").entrySet()) {
      saved.add(item.getKey(), found(seen, item.getValue().getAsString().split("\\."), 0));
    }
    return faults;
  }

  private static Map<String, JsonElement> members(JsonObject check, String name) {
    return check.has(name) ? check.getAsJsonObject(name).asMap() : Map.of();
  }

  /** Sends the request of a check, and returns what came back. */
  private JsonObject call(JsonObject check) throws Exception {
    MethodDescriptor method = method(check.get("rpc").getAsString());
    DynamicMessage.Builder request = DynamicMessage.newBuilder(method.getInputType());
    JsonFormat.parser().merge(expanded(check.get("request")).toString(), request);
    Metadata sent = new Metadata();
    members(check, "metadata").forEach((name, value) -> sent.put(ascii(name), value.getAsString()));
    AtomicReference<Metadata> headers = new AtomicReference<>();
    Channel channel = ClientInterceptors.intercept(
        this.channel,
        MetadataUtils.newAttachHeadersInterceptor(sent),
        MetadataUtils.newCaptureMetadataInterceptor(headers, new AtomicReference<>()));
    double seconds = check.has("timeout_seconds") ? check.get("timeout_seconds").getAsDouble() : 60;
    CallOptions options = CallOptions.DEFAULT.withDeadlineAfter((long) (seconds * 1e6), TimeUnit.MICROSECONDS);
    int cancelAfter = check.has("cancel_after") ? check.get("cancel_after").getAsInt() : -1;

    JsonObject seen = new JsonObject();
    JsonArray messages = new JsonArray();
    seen.add("messages", messages);
    seen.addProperty("status", "OK");
    Context.CancellableContext context = Context.current().withCancellation();
    Context previous = context.attach();
    try {
      Iterator<Message> responses = ClientCalls.blockingServerStreamingCall(
          channel, described(method), options, request.build());
      while (responses.hasNext()) {
        JsonObject message = JsonParser.parseString(printer.print(responses.next())).getAsJsonObject();
        if (message.has("waiting")) { // no part of the result
          continue;
        }
        messages.add(message);
        if (messages.size() == cancelAfter) {
          context.cancel(null);
        }
      }
    } catch (StatusRuntimeException error) {
      seen.addProperty("status", error.getStatus().getCode().name());
      seen.add("details", details(error));
    } finally {
      context.detach(previous);
      context.cancel(null);
    }
    JsonObject received = new JsonObject();
    Metadata initial = headers.get() == null ? new Metadata() : headers.get(); // null before they arrive
    initial.keys().stream().filter(name -> !name.endsWith("-bin"))
        .forEach(name -> received.addProperty(name, initial.get(ascii(name))));
    seen.add("headers", received);
    return seen;
  }

  private static Metadata.Key<String> ascii(String name) {
    return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
  }

  /** A unary call is a stream of one message, so that one way of calling serves both. */
  private static io.grpc.MethodDescriptor<Message, Message> described(MethodDescriptor method) {
    return io.grpc.MethodDescriptor.<Message, Message>newBuilder()
        .setType(method.isServerStreaming() ? MethodType.SERVER_STREAMING : MethodType.UNARY)
        .setFullMethodName(SERVICE + "/" + method.getName())
        .setRequestMarshaller(marshaller(method.getInputType()))
        .setResponseMarshaller(marshaller(method.getOutputType()))
        .build();
  }

  private static io.grpc.MethodDescriptor.Marshaller<Message> marshaller(Descriptor type) {
    return ProtoUtils.marshaller((Message) DynamicMessage.getDefaultInstance(type));
  }

  /** Returns the details of an error by name. */
  private JsonObject details(StatusRuntimeException error) throws Exception {
    JsonObject details = new JsonObject();
    com.google.rpc.Status status = StatusProto.fromThrowable(error);
    for (Any packed : status == null ? List.<Any>of() : status.getDetailsList()) {
      Message detail = unpacked(packed);
      if (detail != null) {
        details.add(detail.getDescriptorForType().getName(), JsonParser.parseString(printer.print(detail)));
      }
    }
    return details;
  }

  /** Returns the content of a detail, or null if its type is not among the descriptors. */
  private Message unpacked(Any packed) throws Exception {
    String name = packed.getTypeUrl().substring(packed.getTypeUrl().lastIndexOf('/') + 1);
    for (FileDescriptor file : files.values()) {
      for (Descriptor type : file.getMessageTypes()) {
        if (type.getFullName().equals(name)) {
          return DynamicMessage.parseFrom(type, packed.getValue());
        }
      }
    }
    return null;
  }

  /** Replaces `$name` by a saved value, and {"repeat": text, "times": n} by the long text. */
  private JsonElement expanded(JsonElement value) {
    if (value.isJsonPrimitive() && value.getAsJsonPrimitive().isString() && value.getAsString().startsWith("$")) {
      return saved.get(value.getAsString().substring(1));
    }
    if (value.isJsonArray()) {
      JsonArray array = new JsonArray();
      value.getAsJsonArray().forEach(part -> array.add(expanded(part)));
      return array;
    }
    if (!value.isJsonObject()) {
      return value;
    }
    JsonObject object = value.getAsJsonObject();
    if (object.has("repeat")) {
      return new JsonPrimitive(object.get("repeat").getAsString().repeat(object.get("times").getAsInt()));
    }
    JsonObject whole = new JsonObject();
    object.asMap().forEach((name, part) -> whole.add(name, expanded(part)));
    return whole;
  }

  /** Returns the value at a path, null if there is none; `*` collects from every element. */
  private static JsonElement found(JsonElement value, String[] path, int start) {
    if (value == null || start == path.length) {
      return value;
    }
    String step = path[start];
    if (step.equals("*")) {
      JsonArray parts = new JsonArray();
      for (JsonElement part : value.getAsJsonArray()) {
        JsonElement inner = found(part, path, start + 1);
        if (inner != null) {
          parts.add(inner);
        }
      }
      return parts;
    }
    if (value.isJsonArray()) {
      int size = value.getAsJsonArray().size();
      int index = Integer.parseInt(step);
      index += index < 0 ? size : 0;
      return 0 <= index && index < size ? found(value.getAsJsonArray().get(index), path, start + 1) : null;
    }
    return value.isJsonObject() ? found(value.getAsJsonObject().get(step), path, start + 1) : null;
  }

  /** Compares a value with what the table expects of it. */
  private static boolean holds(JsonElement value, JsonElement expected) {
    if (!expected.isJsonObject()) {
      return same(value, expected);
    }
    JsonObject rule = expected.getAsJsonObject();
    if (rule.has("absent")) {
      return value == null;
    }
    if (value == null) {
      return false;
    }
    if (rule.has("near")) {
      return Math.abs(value.getAsDouble() - rule.get("near").getAsDouble()) <= rule.get("within").getAsDouble();
    }
    if (rule.has("at_least")) {
      return value.getAsDouble() >= rule.get("at_least").getAsDouble();
    }
    if (rule.has("count")) {
      return value.isJsonArray() && value.getAsJsonArray().size() == rule.get("count").getAsInt();
    }
    if (rule.has("includes")) {
      for (JsonElement part : value.isJsonArray() ? value.getAsJsonArray() : new JsonArray()) {
        if (same(part, rule.get("includes"))) {
          return true;
        }
      }
      return false;
    }
    return Pattern.compile(rule.get("matches").getAsString()).matcher(value.getAsString()).find();
  }

  /** Compares as JSON does: 600 equals 600.0. */
  private static boolean same(JsonElement value, JsonElement expected) {
    if (value != null && value.isJsonArray() && expected.isJsonArray()) {
      JsonArray left = value.getAsJsonArray();
      JsonArray right = expected.getAsJsonArray();
      boolean equal = left.size() == right.size();
      for (int i = 0; equal && i < left.size(); i++) {
        equal = same(left.get(i), right.get(i));
      }
      return equal;
    }
    if (value != null && isNumber(value) && isNumber(expected)) {
      return value.getAsDouble() == expected.getAsDouble();
    }
    return expected.equals(value);
  }

  private static boolean isNumber(JsonElement value) {
    return value.isJsonPrimitive() && value.getAsJsonPrimitive().isNumber();
  }

  /** Returns what breaks the rules of every stream: header, items, summary; numbered from 0. */
  private static List<String> streamFaults(JsonArray messages) {
    List<String> faults = new ArrayList<>();
    for (int number = 0; number < messages.size(); number++) {
      JsonObject message = messages.get(number).getAsJsonObject();
      long sequence = message.has("sequence") ? message.get("sequence").getAsLong() : 0;
      if (sequence != number) {
        faults.add("message " + number + " has sequence " + sequence);
      }
      if (message.has("header") != (number == 0)) {
        faults.add("message " + number + ": expected a header in the first message only");
      }
      if (message.has("summary") != (number == messages.size() - 1)) {
        faults.add("message " + number + ": expected a summary in the last message only");
      }
    }
    return faults;
  }
}
